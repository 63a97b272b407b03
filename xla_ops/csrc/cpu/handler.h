// Definition of the handlers of the CPU.

#ifndef XLA_OPS_CSRC_CPU_HANDLER_H_
#define XLA_OPS_CSRC_CPU_HANDLER_H_

#include "../call.h"

namespace xla_ops {

template <typename CallType>
ffi::Error handle(void (*run)(ffi::ThreadPool&, const CallType&), ffi::ThreadPool pool,
                  ffi::RemainingArgs arguments, ffi::RemainingRets results, ffi::Dictionary attributes) {
  return guarded([&] {
    CallType call(arguments, results, attributes);
    call.check_all_are_read();
    call.check();
    run(pool, call);
    return ffi::Error::Success();
  });
}

}  // namespace xla_ops

// Defines a handler that reads and checks the operands of a call, and passes them to run(pool, call).
#define XLA_OPS_DEFINE_HANDLER(handler, run)                                                        \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(                                                                    \
      handler,                                                                                      \
      [](ffi::ThreadPool pool, ffi::RemainingArgs arguments, ffi::RemainingRets results,            \
         ffi::Dictionary attributes) { return handle(run, pool, arguments, results, attributes); }, \
      ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets().Attrs())

#endif  // XLA_OPS_CSRC_CPU_HANDLER_H_
