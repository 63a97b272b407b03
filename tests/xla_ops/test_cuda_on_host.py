"""Tests of the CUDA kernels, compiled as C++ and run on the host by `cuda_on_host`, against brute force.

g++ compiles the same source as nvcc, with AddressSanitizer and UndefinedBehaviorSanitizer. Results and
temporaries are initialised to NaN, so that elements that are not written, or read too early, are detected.
"""

import concurrent.futures
import functools
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from op_problems import (
    DTYPE,
    LOSS,
    SGD_ROUNDING_SHAPES,
    Problem,
    assert_loss,
    assert_matmul,
    assert_top_k,
    brute_force_loss,
    brute_force_matmul,
    brute_force_top_k,
    check_dense_rounding,
    check_sgd_rounding,
    make_problem,
    sparsify,
)

from xla_ops import SparseInputs, _native
from xla_ops._fan_in_loss import LOSSES

HERE = Path(__file__).parent / "cuda_on_host"
KERNELS = Path(__file__).parents[2] / "xla_ops" / "csrc" / "cuda"
FLAGS = ["-std=c++17", "-O1", "-g", "-fno-strict-aliasing", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

# Devices: processors, blocks of threads per processor, and maximum bytes of shared memory per block.
SMALL = (2, 1, 0)  # no inputs in shared memory; each of the 2 blocks processes many items
SHARED = (2, 1, 99 << 10)


def build(directory, *defines):
    """Compile the kernels and the executor into one program; return its path."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ with its sanitizers compiles the kernels")

    def run(*arguments):
        finished = subprocess.run([compiler, *SANITIZERS, *arguments], capture_output=True, text=True)
        assert finished.returncode == 0, finished.stderr

    def compile_one(source):
        include = [f"-I{HERE}", f"-I{KERNELS}"]
        run("-x", "c++", *FLAGS, *defines, *include, "-c", source, "-o", directory / f"{source.stem}.o")

    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(compile_one, [*HERE.glob("*.cc"), *KERNELS.glob("*.cu")]))
    path = directory / "kernels_on_host"
    run(*directory.glob("*.o"), "-o", path)
    return path


def call(program, directory, op, arrays, results, device, *extra):
    """Run an op, and return its results.

    Args:
      program: path of the program.
      directory: directory for the files of arrays.
      op: name of the op.
      arrays: the operands by name, with SparseInputs or None as "sparse".
      results: a list of (name, shape, dtype).
      device: processors, blocks per processor, shared memory per block.
      extra: further arguments of `main.cc`.
    """
    call_and_count(program, directory, op, arrays, device, *extra)
    return [np.fromfile(directory / name, dtype).reshape(shape) for name, shape, dtype in results]


def call_and_count(program, directory, op, arrays, device, *extra):
    """Run an op; return the bytes of its workspace and the number of atomic additions of floats."""
    sparse = arrays.get("sparse")
    arrays = {name: a for name, a in arrays.items() if name != "sparse"}
    arrays |= dict.fromkeys(("rows", "columns", "values")) if sparse is None else vars(sparse)
    columns = arrays.pop("num_columns", 0)
    for name, array in arrays.items():
        (np.zeros(0) if array is None else array).tofile(directory / name)
    layer, *typed = ("kernel", "mu", "mu") if op == "dense_step.adam" else ("indices", "x", "indices")
    (batch, in_features), (labels, fan_in) = arrays["x"].shape, arrays[layer].shape
    dtypes = [arrays[name].dtype.name for name in typed]
    numbers = map(str, [batch, in_features, labels, fan_in, columns, *device, *extra])
    finished = subprocess.run([program, op, directory, *dtypes, *numbers], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return tuple(map(int, finished.stdout.split()))


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    return build(tmp_path_factory.mktemp("cuda_on_host"))


@pytest.fixture(scope="session")
def program_with_vector_atomics(tmp_path_factory):
    """Return a program as for compute capability 9.0 and later, which adds four values of d_x at a time."""
    return build(tmp_path_factory.mktemp("cuda_on_host"), "-DXLA_OPS_VECTOR_ATOMICS=1")


@pytest.fixture
def run(program, tmp_path):
    """Return `call` with the program and a directory."""
    return functools.partial(call, program, tmp_path)


@pytest.fixture
def run_with_vector_atomics(program_with_vector_atomics, tmp_path):
    """Return `call` with the program that has vector atomics and a directory."""
    return functools.partial(call, program_with_vector_atomics, tmp_path)


SHAPES = pytest.mark.parametrize(
    ("batch", "in_features", "labels", "fan_in"),
    [
        (1, 7, 1, 1),
        (31, 50, 67, 3),
        (3, 20, 67, 5),  # 335 weights, 3 more than a multiple of 4
        (32, 33, 64, 32),
        (33, 64, 129, 64),
        (257, 40, 70, 33),
        (2, 300, 200, 100),
    ],
)
EMPTY = pytest.mark.parametrize("shape", [(0, 5, 6, 3), (5, 0, 6, 3), (5, 6, 0, 3)], ids=str)
DEVICE = pytest.mark.parametrize("device", [SMALL, SHARED], ids=["small", "shared"])


# ---- workspaces ----


def check_workspaces(program, tmp_path, problem, sparse=None):
    """Check that launchers take exactly the workspace that `_native` requests from XLA."""
    dtype, batch, labels = problem.x.dtype, problem.x.shape[0], problem.kernel.shape[0]
    arrays = {**problem._asdict(), "dy": np.zeros((batch, labels), dtype), "sparse": sparse}
    arrays |= {"rates": np.ones(3, np.float32), "key": np.zeros(4, np.uint32)}
    for name in ("kernel", "bias"):
        arrays |= {f"mu_{name}": np.ones_like(arrays[name]), f"nu_{name}": np.ones_like(arrays[name])}
    k, width = min(3, labels), problem.positives.shape[1]
    for op, *extra in (
        ("fan_in_matmul.forward",),
        ("fan_in_matmul.gradients",),
        ("fan_in_loss.value", 0, width),
        ("fan_in_loss.gradients", 0, width),
        ("fan_in_step.sgd", 0, width),
        *([("fan_in_step.adam", 0, width)] if dtype == jnp.float32 else []),
        ("fan_in_top_k", k, labels),
    ):
        results = [jax.ShapeDtypeStruct((batch, k), jnp.float32)]
        entries = () if sparse is None else (sparse.rows, sparse.columns, sparse.values)
        columns = None if sparse is None else sparse.num_columns
        requested = _native.cuda_workspace(
            f"xla_ops.{op}", results, columns, problem.x, *entries, problem.kernel
        )
        taken, _ = call_and_count(program, tmp_path, op, arrays, SMALL, *extra)
        assert taken == requested.size


NEEDS_CUDA = pytest.mark.skipif(_native.cuda() is None, reason="xla_ops._cuda is not built here (no nvcc)")


@NEEDS_CUDA
@SHAPES
@DTYPE
def test_launchers_take_requested_workspace(program, tmp_path, batch, in_features, labels, fan_in, dtype):
    problem = make_problem(batch, in_features, labels, fan_in, dtype=dtype)
    check_workspaces(program, tmp_path, problem)


@NEEDS_CUDA
@pytest.mark.parametrize("shape", [(1, 7, 1, 1), (33, 64, 129, 33), (70, 300, 10, 3)], ids=str)
@DTYPE
def test_launchers_take_requested_workspace_with_sparse_inputs(program, tmp_path, shape, dtype):
    _, problem, sparse = sparsify(make_problem(*shape, dtype=dtype), 3)
    check_workspaces(program, tmp_path, problem, sparse)


def test_number_of_blocks_is_limited_by_workspace(run):
    device, shape = (2000, 1, 0), (1, 3, 1024 * 64 + 1, 1)
    problem = make_problem(*shape, dtype=jnp.bfloat16)
    results = [("d_kernel", problem.kernel.shape, jnp.bfloat16)]
    (d_kernel,) = run("fan_in_matmul.gradients", problem._asdict(), results, device)
    np.testing.assert_array_equal(d_kernel, brute_force_matmul(problem)[2].astype(jnp.bfloat16))
    problem = make_problem(*shape, dtype=jnp.bfloat16)
    extra = (LOSSES.index("bce"), problem.positives.shape[1])
    (value,) = run("fan_in_loss.gradients", problem._asdict(), [("value", (), np.float32)], device, *extra)
    np.testing.assert_allclose(value, brute_force_loss(problem, "bce")[0][0], rtol=1e-5)


# ---- fan_in_matmul ----


def check_matmul(run, problem, device):
    """Compare the logits and gradients of fan_in_matmul with brute force."""
    dtype = problem.x.dtype
    shapes = {"y": problem.dy.shape, "d_x": problem.x.shape, "d_kernel": problem.kernel.shape}
    if problem.bias is not None:
        shapes["d_bias"] = problem.bias.shape
    y, *gradients = [(name, shape, dtype) for name, shape in shapes.items()]
    results = run("fan_in_matmul.forward", problem._asdict(), [y], device)
    results += run("fan_in_matmul.gradients", problem._asdict(), gradients, device)
    assert_matmul(results + [None] * (problem.bias is None), problem)


@SHAPES
@DTYPE
@DEVICE
def test_matmul_matches_brute_force(run, batch, in_features, labels, fan_in, dtype, device):
    index_dtype = np.uint16 if fan_in % 2 else np.int32
    problem = make_problem(
        batch, in_features, labels, fan_in, dtype=dtype, index_dtype=index_dtype, with_bias=labels != 70
    )
    check_matmul(run, problem, device)


@EMPTY
@DEVICE
def test_matmul_with_empty_dimensions(run, shape, device):
    batch, in_features, labels, fan_in = shape
    problem = make_problem(batch, max(1, in_features), labels, fan_in)
    check_matmul(run, problem._replace(x=problem.x[:, :in_features]), device)


@DTYPE
@DEVICE
def test_matmul_with_indices_out_of_range(run, dtype, device):
    problem = make_problem(33, 40, 70, 17, dtype=dtype)
    outside = np.array([40, 41, 2**31 - 1, -(2**31), -1, -40, -41], np.int32)
    problem = problem._replace(
        x=np.full_like(problem.x, np.nan), indices=np.resize(outside, problem.indices.shape)
    )
    (y,) = run("fan_in_matmul.forward", problem._asdict(), [("y", (33, 70), dtype)], device)
    np.testing.assert_array_equal(y, np.broadcast_to(problem.bias, y.shape))
    results = [("d_x", (33, 40), dtype), ("d_kernel", (70, 17), dtype)]
    for gradient in run("fan_in_matmul.gradients", problem._asdict(), results, device):
        assert not np.any(gradient)


@DTYPE
@pytest.mark.parametrize(
    "is_zero",
    [
        lambda b, label: b >= 0,
        lambda b, label: label % 3 != 0,
        lambda b, label: b < 64,
        lambda b, label: b >= 32,
        lambda b, label: (b != 69) | (label != 131),
    ],
    ids=["all", "all but every third label", "first tiles", "last tiles", "all but one"],
)
def test_matmul_with_zero_cotangents(run, dtype, is_zero):
    problem = make_problem(70, 30, 132, 35, dtype=dtype)
    b, label = np.mgrid[:70, :132]
    problem.dy[is_zero(b, label)] = 0
    check_matmul(run, problem, SMALL)


@DTYPE
@pytest.mark.parametrize("fan_in", [8, 35])
def test_gradients_with_vector_atomics(run_with_vector_atomics, dtype, fan_in):
    problem = make_problem(70, 40, 130, fan_in, dtype=dtype)
    check_matmul(run_with_vector_atomics, problem, SMALL)
    problem.dy[np.random.default_rng(0).random(problem.dy.shape) < 0.9] = 0
    check_matmul(run_with_vector_atomics, problem, SMALL)
    problem = make_problem(70, 40, 130, 35, dtype=dtype)
    results = run_loss(run_with_vector_atomics, problem, "squared_hinge", SMALL)
    assert_loss(results, problem, "squared_hinge")


@DTYPE
def test_zero_cotangents_cause_no_atomic_additions(program, program_with_vector_atomics, tmp_path, dtype):
    problem = make_problem(33, 20, 70, 9, dtype=dtype)
    problem = problem._replace(indices=problem.indices.astype(np.int64).clip(0, 19).astype(np.int32))
    problem.dy[:] = 0
    # Two in the same group of 4 points, and one in another tile.
    problem.dy[13, 66] = problem.dy[15, 66] = problem.dy[32, 66] = 1
    for variant, additions_per_group in ((program, 4), (program_with_vector_atomics, 1)):
        _, additions = call_and_count(variant, tmp_path, "fan_in_matmul.gradients", problem._asdict(), SMALL)
        assert additions == 2 * 9 * additions_per_group


@DTYPE
@pytest.mark.parametrize("fan_in", [9, 40])
def test_gradients_without_d_x(program, tmp_path, dtype, fan_in):
    problem = make_problem(70, 20, 130, fan_in, dtype=dtype)
    arrays = problem._asdict() | {"dy": np.ones((70, 130), dtype), "rates": np.ones(3, np.float32)}
    arrays["key"] = np.zeros(4, np.uint32)
    names = ["kernel", "bias"]
    for op, *extra in (
        ("fan_in_matmul.gradients",),
        ("fan_in_loss.gradients", 0, problem.positives.shape[1]),
        ("fan_in_step.sgd", 0, problem.positives.shape[1]),
    ):
        kinds = [f"{name}.new" if "step" in op else f"d_{name}" for name in names]
        results = [
            (kind, getattr(problem, name).shape, dtype) for kind, name in zip(kinds, names, strict=True)
        ]
        (tmp_path / "no_d_x").unlink(missing_ok=True)
        expected = call(program, tmp_path, op, arrays, results, SMALL, *extra)
        (tmp_path / "no_d_x").touch()
        for a, b in zip(call(program, tmp_path, op, arrays, results, SMALL, *extra), expected, strict=True):
            np.testing.assert_array_equal(a, b)
        (d_x,) = call(program, tmp_path, op, arrays, [("d_x", problem.x.shape, dtype)], SMALL, *extra)
        assert np.isnan(d_x.astype(np.float32)).all()  # not written
        assert call_and_count(program, tmp_path, op, arrays, SMALL, *extra)[1] == 0


# ---- fan_in_loss ----


def run_loss(run, problem, loss, device, sparse=None):
    """Return [loss, d_x, d_kernel, d_bias], after a check that both handlers give the same loss."""
    dtype, extra = problem.x.dtype, (LOSSES.index(loss), problem.positives.shape[1])
    arrays = problem._asdict() | {"sparse": sparse}
    shapes = {f"d_{name}": getattr(problem, name) for name in ("x", "kernel", "bias")}
    results = [(name, () if a is None else a.shape, dtype) for name, a in shapes.items() if a is not None]
    value, *gradients = run(
        "fan_in_loss.gradients", arrays, [("value", (), np.float32), *results], device, *extra
    )
    (value_only,) = run("fan_in_loss.value", arrays, [("value", (), np.float32)], device, *extra)
    np.testing.assert_array_equal(value_only, value)
    return [value, *gradients, *([None] if problem.bias is None else [])]


@SHAPES
@DTYPE
@LOSS
def test_loss_matches_brute_force(run, batch, in_features, labels, fan_in, dtype, loss):
    index_dtype = np.int32 if fan_in % 2 else np.uint16
    problem = make_problem(
        batch,
        in_features,
        labels,
        fan_in,
        num_positives=40 if batch == 33 else batch % 5,
        dtype=dtype,
        index_dtype=index_dtype,
        with_bias=labels != 70,
    )
    assert_loss(run_loss(run, problem, loss, SMALL), problem, loss)


@EMPTY
@LOSS
def test_loss_with_empty_dimensions(run, shape, loss):
    batch, in_features, labels, fan_in = shape
    problem = make_problem(batch, max(1, in_features), max(1, labels), fan_in)
    problem = problem._replace(
        x=problem.x[:, :in_features],
        **{n: getattr(problem, n)[:labels] for n in ("kernel", "indices", "bias")},
    )
    results = run_loss(run, problem, loss, SMALL)
    if batch and labels:
        assert_loss(results, problem, loss)
    else:
        assert np.isnan(results[0])
        assert not any(np.any(gradient) for gradient in results[1:])


@DTYPE
def test_loss_gradient_is_zero_where_margin_is_met(run, dtype):
    # Every logit equals the bias, and meets its margin as long as all points have label 3.
    problem = make_problem(70, 20, 130, 5, dtype=dtype)
    bias = np.full(130, -1.5).astype(dtype)
    bias[3] = 1.5
    problem = problem._replace(x=np.zeros_like(problem.x), bias=bias, positives=np.full((70, 1), 3, np.int32))
    for result in run_loss(run, problem, "squared_hinge", SMALL):
        assert not np.any(result)
    problem.positives[40] = -1
    value, d_x, d_kernel, d_bias = run_loss(run, problem, "squared_hinge", SMALL)
    assert value > 0
    assert not np.any(d_kernel)
    np.testing.assert_array_equal(np.flatnonzero(np.any(d_x.astype(np.float32), axis=1)), [40])
    np.testing.assert_array_equal(np.flatnonzero(d_bias.astype(np.float32)), [3])


@LOSS
def test_loss_propagates_nan(run, loss):
    problem = make_problem(40, 9, 70, 4)
    problem.x[35] = np.nan
    value, d_x, *_ = run_loss(run, problem, loss, SMALL)
    assert np.isnan(value)
    assert np.isnan(d_x[35]).any()
    assert np.isfinite(np.delete(d_x, 35, axis=0)).all()


def test_bce_of_extreme_logits(run):
    # Logits of +1e4 and -1e4; the first two labels are positives.
    problem = Problem(
        x=np.ones((20, 1), np.float32),
        kernel=np.array([[1e4], [-1e4], [1e4], [-1e4]], np.float32),
        indices=np.zeros((4, 1), np.int32),
        bias=np.zeros(4, np.float32),
        positives=np.tile(np.array([[0, 1]], np.int32), (20, 1)),
    )
    value, d_x, d_kernel, d_bias = run_loss(run, problem, "bce", SMALL)
    np.testing.assert_allclose(value, 2 * 1e4 / 4, rtol=1e-6)
    np.testing.assert_allclose(d_bias, [0, -0.25, 0.25, 0], rtol=1e-6, atol=1e-30)
    np.testing.assert_allclose(d_kernel[:, 0], [0, -0.25, 0.25, 0], rtol=1e-6, atol=1e-30)
    np.testing.assert_allclose(d_x, np.full((20, 1), 2 * 1e4 / 80), rtol=1e-6)


# ---- fan_in_step ----


def run_step(run, op, problem, loss, arrays, *extra):
    """Run a step; return [loss, d_x], and a dict with the updated kernel, bias and moments.

    Args:
      run: the fixture.
      op: name of the op.
      problem: the problem.
      loss: name of the loss.
      arrays: further operands by name, such as moments and learning rates.
      extra: further arguments of `main.cc`.
    """
    dtype, extra = problem.x.dtype, (LOSSES.index(loss), problem.positives.shape[1], *extra)
    operands = problem._asdict() | arrays
    names = [n for n in ("kernel", "bias", "mu_kernel", "nu_kernel", "mu_bias", "nu_bias") if n in operands]
    updated = [(f"{n}.new", operands[n].shape, dtype) for n in names if operands[n] is not None]
    results = [("value", (), np.float32), ("d_x", problem.x.shape, dtype), *updated]
    value, d_x, *new = run(op, operands, results, SMALL, *extra)
    return [value, d_x], dict(zip([name[:-4] for name, *_ in updated], new, strict=True))


STEP_SHAPES = pytest.mark.parametrize("shape", [(1, 7, 1, 1), (33, 64, 129, 64), (70, 40, 70, 33)], ids=str)


@STEP_SHAPES
@LOSS
def test_sgd_step_float32(run, shape, loss):
    problem, rate = make_problem(*shape, with_bias=shape[2] != 70), np.float32(3)
    arrays = {"rates": rate, "key": np.zeros(4, np.uint32)}
    results, new = run_step(run, "fan_in_step.sgd", problem, loss, arrays)
    expected, errors = brute_force_loss(problem, loss)
    assert_loss([*results, *run_loss(run, problem, loss, SMALL)[2:]], problem, loss)
    for name, gradient, error in zip(("kernel", "bias"), expected[2:], errors[2:], strict=True):
        if name in new:
            exact = getattr(problem, name) - rate * gradient
            allowed = rate * error + np.finfo(np.float32).eps * (np.abs(exact) + np.abs(rate * gradient))
            assert np.all(np.abs(new[name] - exact) <= allowed)


@STEP_SHAPES
@LOSS
def test_adam_step(run, shape, loss):
    problem, rates = make_problem(*shape, with_bias=shape[2] != 70), np.float32([0.1, 3, 20])
    rng = np.random.default_rng(0)
    moments = {}
    for name in ("kernel", "bias"):
        weights = getattr(problem, name)
        moments[f"mu_{name}"] = weights if weights is None else rng.normal(size=weights.shape) * 1e-2
        moments[f"nu_{name}"] = weights if weights is None else rng.uniform(1e-4, 1e-3, weights.shape)
    moments = {name: None if m is None else m.astype(np.float32) for name, m in moments.items()}
    results, new = run_step(run, "fan_in_step.adam", problem, loss, moments | {"rates": rates})
    expected, _ = brute_force_loss(problem, loss)
    np.testing.assert_allclose(results[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(results[1], expected[1], rtol=1e-4, atol=1e-6 * np.abs(expected[1]).max())
    for name, gradient in zip(("kernel", "bias"), expected[2:], strict=True):
        if name not in new:
            continue
        mu = np.float64(0.8) * moments[f"mu_{name}"] + 0.2 * gradient
        nu = np.float64(0.99) * moments[f"nu_{name}"] + 0.01 * gradient**2
        weights = getattr(problem, name) - 0.1 * (3 * mu) / (np.sqrt(20 * nu) + 1e-7)
        for key, exact in ((f"mu_{name}", mu), (f"nu_{name}", nu), (name, weights)):
            np.testing.assert_allclose(new[key], exact, rtol=1e-5, atol=1e-6 * np.abs(exact).max())


@pytest.mark.parametrize("shape", SGD_ROUNDING_SHAPES)
def test_sgd_step_bfloat16_rounding_matches_philox(run, shape):
    def sgd(x, kernel, indices, bias, positives, rate, seed, step):
        problem = Problem(x, kernel, indices, bias, positives)
        arrays = {"rates": rate, "key": np.array([seed, 0, step, 0], np.uint32)}
        _, new = run_step(run, "fan_in_step.sgd", problem, "squared_hinge", arrays)
        return new["kernel"], new["bias"]

    check_sgd_rounding(shape, sgd)


@pytest.mark.parametrize("cut", [1, 64, 70])
def test_sgd_steps_of_label_shards_match_full_step(run, cut):
    labels = 130
    problem = make_problem(33, 12, labels, 3, num_positives=3, dtype=jnp.bfloat16)

    def step(shard):
        layer = {name: getattr(problem, name)[shard] for name in ("kernel", "indices", "bias")}
        local = problem._replace(**layer, positives=problem.positives - np.int32(shard.start))
        arrays = {"rates": np.float32(100), "key": np.uint32([5, 0, 7, shard.start])}
        return run_step(run, "fan_in_step.sgd", local, "squared_hinge", arrays, labels)

    (results, new), *shards = step(slice(0, labels)), step(slice(0, cut)), step(slice(cut, labels))
    np.testing.assert_allclose(sum(r[0] for r, _ in shards), results[0], rtol=1e-5)
    for name in ("kernel", "bias"):
        concatenated = np.concatenate([new_shard[name] for _, new_shard in shards])
        np.testing.assert_array_equal(concatenated.view(np.uint16), new[name].view(np.uint16))


def test_steps_with_empty_batch(run):
    problem = make_problem(0, 9, 70, 3)
    moments = {name: np.zeros_like(getattr(problem, name[3:])) for name in ("mu_kernel", "mu_bias")}
    moments |= {name.replace("mu", "nu"): m for name, m in moments.items()}
    arrays = {"rates": np.ones(3, np.float32), "key": np.zeros(4, np.uint32)}
    for op, extra in (("fan_in_step.sgd", {}), ("fan_in_step.adam", moments)):
        results, new = run_step(run, op, problem, "bce", arrays | extra)
        assert np.isnan(results[0])
        np.testing.assert_array_equal(new["kernel"], problem.kernel)
        np.testing.assert_array_equal(new["bias"], problem.bias)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sgd_step_propagates_nan(run, dtype):
    problem = make_problem(3, 2, 200, 1, dtype=dtype)
    problem = problem._replace(indices=(np.arange(200) % 2)[:, np.newaxis].astype(np.int32))
    problem.x[1, 0] = np.nan
    arrays = {"rates": np.float32(0.1), "key": np.zeros(4, np.uint32)}
    _, new = run_step(run, "fan_in_step.sgd", problem, "bce", arrays)
    assert np.isnan(new["kernel"][:, 0].astype(np.float32)).tolist() == [True, False] * 100


# ---- dense_step ----


def run_dense(run, arrays):
    """Run a dense Adam step; return the new kernel and moments."""
    results = [(f"{name}.new", arrays[name].shape, arrays[name].dtype) for name in ("kernel", "mu", "nu")]
    return run("dense_step.adam", arrays, results, SMALL)


def dense_arrays(batch, rows, columns, dtype):
    rng = np.random.default_rng(0)
    return {
        "x": rng.normal(size=(batch, rows)).astype(np.float32),
        "dy": rng.normal(size=(batch, columns)).astype(np.float32),
        "kernel": rng.normal(size=(rows, columns)).astype(np.float32),
        "mu": rng.normal(size=(rows, columns)).astype(dtype),
        "nu": rng.uniform(0.1, 2, (rows, columns)).astype(dtype),
        "rates": np.float32([0.1, 3, 20]),
        "decays": np.float32([0.8, 0.99]),
        "key": np.uint32([7, 0, 3]),
    }


DENSE_SHAPES = [
    (0, 3, 5),
    (1, 1, 1),
    (33, 1, 257),
    (1, 65, 1),
    (16, 64, 128),
    (32, 70, 300),
    (33, 130, 131),
    (100, 63, 127),
]


@pytest.mark.parametrize("shape", DENSE_SHAPES, ids=str)
@DTYPE
def test_dense_adam_step(run, shape, dtype):
    arrays = dense_arrays(*shape, dtype)
    kernel, mu, nu = (a.astype(np.float64) for a in run_dense(run, arrays))
    gradient = arrays["x"].T.astype(np.float64) @ arrays["dy"]
    exact_mu = 0.8 * arrays["mu"].astype(np.float64) + 0.2 * gradient
    exact_nu = 0.99 * arrays["nu"].astype(np.float64) + 0.01 * gradient**2
    exact_kernel = arrays["kernel"] - 0.1 * (3 * exact_mu) / (np.sqrt(20 * exact_nu) + 1e-7)
    error = 1e-5 * (np.abs(arrays["x"]).T @ np.abs(arrays["dy"])) + 1e-6  # bounds the error of the gradient
    np.testing.assert_array_less(np.abs(kernel - exact_kernel), error)
    gap = 2**-7 if dtype == jnp.bfloat16 else 0  # the relative distance of neighbouring bfloat16 values
    np.testing.assert_array_less(np.abs(mu - exact_mu), error + gap / 2 * np.abs(exact_mu))
    np.testing.assert_array_less(np.abs(nu - exact_nu), error * (1 + np.abs(gradient)) + gap * exact_nu)


@pytest.mark.parametrize("shape", DENSE_SHAPES, ids=str)
def test_dense_adam_step_bfloat16_rounding_matches_philox(run, shape):
    def adam(x, dy, kernel, mu, nu, b1, b2, seed, number):
        arrays = {"x": x, "dy": dy, "kernel": kernel, "mu": mu, "nu": nu, "rates": np.ones(3, np.float32)}
        arrays |= {"decays": np.float32([b1, b2]), "key": np.array([seed, 0, number], np.uint32)}
        return run_dense(run, arrays)

    check_dense_rounding(shape, adam)


@DTYPE
def test_dense_adam_step_propagates_nan(run, dtype):
    arrays = dense_arrays(20, 66, 140, dtype)
    # The NaN of GPUs: adding random bits to it overflows to 0.
    for name, at in (("x", (17, 65)), ("dy", (3, 139))):
        arrays[name].view(np.uint32)[at] = 0x7FFFFFFF
    row, column = np.mgrid[:66, :140]
    for new in run_dense(run, arrays):
        np.testing.assert_array_equal(np.isnan(new.astype(np.float32)), (row == 65) | (column == 139))


# ---- fan_in_top_k ----


def run_top_k(run, problem, k, labels_at_once, device=SMALL, sparse=None):
    """Return (scores, labels); problem is (x, kernel, indices, bias)."""
    x, kernel, indices, bias = problem
    shape = (x.shape[0], k)
    return run(
        "fan_in_top_k",
        {"x": x, "kernel": kernel, "indices": indices, "bias": bias, "sparse": sparse},
        [("scores", shape, np.float32), ("labels", shape, np.int32)],
        device,
        k,
        labels_at_once,
    )


@pytest.mark.parametrize("labels_at_once", [100, 3000])
@pytest.mark.parametrize(
    ("batch", "in_features", "labels", "fan_in", "k"),
    [
        (1, 7, 1, 1, 1),
        (31, 50, 67, 3, 5),
        (33, 9, 300, 33, 1),
        (3, 64, 700, 64, 690),
        (3, 5, 400, 100, 64),
        (2, 5, 70, 3, 0),
        (3, 5, 2600, 3, 40),  # in several chunks
        (1, 20, 1700, 2, 900),  # chunks with fewer than k labels
        (5, 1, 130, 3, 130),
        (0, 5, 10, 3, 4),
    ],
)
@DTYPE
def test_top_k_matches_brute_force(run, batch, in_features, labels, fan_in, k, labels_at_once, dtype):
    index_dtype = np.int32 if fan_in % 2 else np.uint16
    problem = make_problem(
        batch,
        in_features,
        labels,
        fan_in,
        dtype=dtype,
        index_dtype=index_dtype,
        with_bias=labels != 70,
        integer_values=True,
    )
    assert_top_k(run_top_k(run, problem[:4], k, labels_at_once), brute_force_top_k(problem, k))


@pytest.mark.parametrize("labels_at_once", [100, 1000])
def test_top_k_of_nearly_equal_logits(run, labels_at_once):
    problem = make_problem(3, 40, 700, 4)
    problem = problem._replace(bias=np.full(700, 1000, np.float32))  # few bits of the logits differ
    (logits,) = run("fan_in_matmul.forward", problem._asdict(), [("y", (3, 700), np.float32)], SMALL)
    expected = np.argsort(-logits, axis=1, kind="stable")[:, :60]
    scores, labels = run_top_k(run, problem[:4], 60, labels_at_once)
    np.testing.assert_array_equal(labels, expected)
    np.testing.assert_array_equal(scores, np.take_along_axis(logits, expected, axis=1))


@pytest.mark.parametrize("k", [1, 5, 300])
def test_top_k_ties_are_in_order_of_labels(run, k):
    # All scores are 0 or -0, except for labels 250 and 270.
    bias, kernel = np.zeros(300, np.float32), np.zeros((300, 4), np.float32)
    bias[::3], kernel[::3] = -0.0, -0.0
    bias[[250, 270]] = 1
    problem = (np.ones((3, 2), np.float32), kernel, np.zeros((300, 4), np.int32), bias)
    expected = [250, 270, *(label for label in range(300) if label not in (250, 270))][:k]
    for labels_at_once in (64, 512):
        _, labels = run_top_k(run, problem, k, labels_at_once)
        np.testing.assert_array_equal(labels, np.tile(expected, (3, 1)))


def test_top_k_excludes_nan_and_minus_infinity(run):
    bias = np.full(200, -np.inf, np.float32)
    bias[50:100] = np.nan
    bias[[7, 60, 150]] = [-3e38, 2, np.inf]
    problem = (
        np.ones((2, 2), np.float32),
        np.zeros((200, 1), np.float32),
        np.zeros((200, 1), np.int32),
        bias,
    )
    for labels_at_once in (64, 512):
        scores, labels = run_top_k(run, problem, 5, labels_at_once)
        np.testing.assert_array_equal(labels, [[150, 60, 7, -1, -1]] * 2)
        np.testing.assert_array_equal(scores, np.float32([[np.inf, 2, -3e38, -np.inf, -np.inf]] * 2))


# ---- kth_smallest ----


@DTYPE
@pytest.mark.parametrize("size", [1, 1000, 5000])
def test_kth_smallest_matches_sort(run, dtype, size):
    rng = np.random.default_rng(size)
    x = (rng.normal(size=(1, size)) * 10.0 ** rng.integers(-40, 38, (1, size))).astype(dtype)
    x[0, rng.random(size) < 0.2] = x[0, 0]  # ties
    x[0, size // 2 :: 7] = 0
    x[0, 1:3] = -np.inf
    problem = make_problem(1, 1, 1, 1, dtype=dtype)
    ordered = np.sort(np.abs(x.astype(np.float32)), axis=None)
    for k in {1, 2, size // 3, size - 1, size} - {0}:
        k = min(k, size)
        arrays = {**problem._asdict(), "x": x}
        (result,) = run("kth_smallest", arrays, [("result", (), np.float32)], SMALL, k)
        assert result == ordered[k - 1]


# ---- sparse inputs ----

# Batch, D, C, labels, fan_in: full and partial tiles and words of bitmaps, no dense inputs, and connections
# that are staged in several chunks.
SPARSE_SHAPES = pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1, 1),
        (31, 1, 31, 67, 3),
        (32, 0, 32, 64, 32),
        (33, 30, 65, 129, 64),
        (97, 4, 200, 70, 33),
        (70, 40, 1000, 130, 100),
    ],
    ids=str,
)
DENSITY = pytest.mark.parametrize("density", [0.02, 0.5, 1.0])


def check_sparse_matmul(run, full, problem, sparse, device=SMALL):
    """Compare fan_in_matmul with brute force on the problem with all inputs in x; return the results."""
    dtype, dense = problem.x.dtype, problem.x.shape[1]
    shapes = {"y": problem.dy.shape, "d_x": problem.x.shape, "d_kernel": problem.kernel.shape}
    shapes |= {"d_bias": problem.bias.shape} if problem.bias is not None else {}
    y, *gradients = [(name, shape, dtype) for name, shape in shapes.items()]
    arrays = problem._asdict() | {"sparse": sparse}
    results = run("fan_in_matmul.forward", arrays, [y], device)
    results += run("fan_in_matmul.gradients", arrays, gradients, device)
    assert_matmul(results + [None] * (problem.bias is None), full, dense)
    return results


@SPARSE_SHAPES
@DENSITY
@DTYPE
def test_sparse_matmul_matches_brute_force(run, shape, density, dtype):
    batch, dense, columns, labels, fan_in = shape
    problem = make_problem(
        batch,
        dense + columns,
        labels,
        fan_in,
        dtype=dtype,
        index_dtype=np.uint16 if density == 0.5 else np.int32,
        with_bias=labels != 70,
    )
    check_sparse_matmul(run, *sparsify(problem, dense, density=density))


@DTYPE
def test_sparse_gradients_with_vector_atomics(run_with_vector_atomics, dtype):
    problem = make_problem(70, 140, 130, 35, dtype=dtype)
    check_sparse_matmul(run_with_vector_atomics, *sparsify(problem, 40))


@DTYPE
def test_sparse_matmul_with_many_columns(run, dtype):
    # More columns than a block numbers at once: 32 per word, 4 words per thread, 1,024 threads.
    dense, columns = 3, 32 * 4 * 1024 + 2000
    problem = make_problem(40, dense + columns, 70, 9, dtype=dtype)
    indices = problem.indices.copy()
    indices[::2] = dense + columns - 1 - np.arange(35 * 9).reshape(35, 9)
    problem = problem._replace(indices=indices)
    check_sparse_matmul(run, *sparsify(problem, dense, density=0.01), SHARED)


def test_sparse_matmul_with_many_tiles(run):
    batch = 32 * 1024 + 40  # more tiles of 32 points than a block of 1,024 threads counts at once
    problem = make_problem(batch, 10, 1, 9, dtype=jnp.bfloat16)
    problem = problem._replace(indices=np.arange(1, 10, dtype=np.int32)[np.newaxis])
    full, problem, sparse = sparsify(problem, 1, density=0.3)
    assert np.any(full.x[32 * 1024 :, 1:])
    arrays = problem._asdict() | {"sparse": sparse}
    (y,) = run("fan_in_matmul.forward", arrays, [("y", (batch, 1), jnp.bfloat16)], SMALL)
    exact = brute_force_matmul(full)[0]
    np.testing.assert_allclose(y.astype(np.float64), exact, rtol=2**-8, atol=1e-5)


@DTYPE
@pytest.mark.parametrize("count", [0, 1, 300], ids=["none", "one", "many"])
def test_sparse_matmul_with_only_padding(run, dtype, count):
    problem = make_problem(40, 70, 66, 5, dtype=dtype)
    outside = np.resize(np.array([-1, 40, 2**31 - 1, -(2**31)], np.int32), count)
    sparse = SparseInputs(outside, np.zeros(count, np.int32), np.full(count, np.nan, dtype), 67)
    full = problem._replace(x=np.where(np.arange(70) < 3, problem.x, 0).astype(dtype))
    check_sparse_matmul(run, full, problem._replace(x=problem.x[:, :3]), sparse)


@DTYPE
def test_sparse_matmul_with_one_packed_row_per_entry(run, dtype):
    # This is the largest number of packed rows for which there is memory.
    problem = make_problem(40, 43, 66, 5, dtype=dtype)
    x = problem.x.copy()
    x[:, 3:] *= np.eye(40, dtype=dtype)[::-1]
    rows = np.random.default_rng(0).permutation(40).astype(np.int32)
    sparse = SparseInputs(rows, 39 - rows, x[rows, 42 - rows], 40)
    check_sparse_matmul(run, problem._replace(x=x), problem._replace(x=x[:, :3]), sparse)


@DEVICE
@pytest.mark.parametrize("shape", [(0, 5, 6, 3), (5, 6, 0, 3)], ids=str)
def test_sparse_matmul_with_empty_dimensions(run, shape, device):
    batch, inputs, labels, fan_in = shape
    problem = make_problem(batch, inputs, labels, fan_in)
    padding = np.array([0, -1, 3], np.int32)
    sparse = SparseInputs(padding, padding, np.ones(3, np.float32), inputs - 2)
    full = problem._replace(x=np.zeros_like(problem.x))
    problem = problem._replace(x=full.x[:, :2])
    if labels:
        check_sparse_matmul(run, full, problem, sparse, device)
    else:
        (d_x,) = run(
            "fan_in_matmul.gradients",
            problem._asdict() | {"sparse": sparse},
            [("d_x", problem.x.shape, np.float32)],
            device,
        )
        assert not np.any(d_x)


@DTYPE
def test_sparse_matmul_with_zero_columns(run, dtype):
    problem = make_problem(40, 70, 66, 5, dtype=dtype)
    zeros = np.zeros(3, np.int32)
    check_sparse_matmul(
        run, problem, problem, SparseInputs(zeros, zeros, np.full(3, np.nan, dtype), 0), SHARED
    )


@DTYPE
def test_sparse_matmul_does_not_read_absent_inputs(run, dtype):
    # Weights of inputs without entries are NaN, so that results would be NaN if they were multiplied by 0.
    full, problem, sparse = sparsify(make_problem(70, 140, 130, 40, dtype=dtype), 40, density=0.02)
    absent = np.append(~np.any(full.x, axis=0), True)
    absent[:40] = False
    inside = (problem.indices >= 0) & (problem.indices < 140)
    hidden = absent[np.where(inside, problem.indices, 140)] & inside
    kernel = np.where(hidden, np.nan, problem.kernel).astype(dtype)
    full = full._replace(kernel=np.where(hidden, 0, full.kernel).astype(dtype))
    *_, d_kernel, _ = check_sparse_matmul(run, full, problem._replace(kernel=kernel), sparse)
    assert hidden.any()
    assert not np.any(d_kernel[hidden])


def test_repeated_entries_are_added_before_rounding(run):
    # The sum 1 + 100 * 2^-10 would stay 1 if each addition were rounded to bfloat16.
    rows, columns = np.zeros(101, np.int32), np.full(101, 6, np.int32)
    values = np.array([1] + [2**-10] * 100).astype(jnp.bfloat16)
    arrays = {
        "x": np.zeros((1, 1), jnp.bfloat16),
        "kernel": np.ones((1, 1), jnp.bfloat16),
        "indices": np.array([[7]], np.int32),
        "bias": None,
        "sparse": SparseInputs(rows, columns, values, 7),
    }
    (y,) = run("fan_in_matmul.forward", arrays, [("y", (1, 1), jnp.bfloat16)], SMALL)
    assert y == np.asarray(1 + 100 * 2**-10).astype(jnp.bfloat16)


@DTYPE
def test_sparse_matmul_with_zero_cotangents(run, dtype):
    problem = make_problem(70, 100, 132, 35, dtype=dtype)
    full, problem, sparse = sparsify(problem, 10, density=0.2)
    b, label = np.mgrid[:70, :132]
    for is_zero in (b >= 0, label % 3 != 0, b < 64, b >= 32, (b != 69) | (label != 131)):
        dy = np.where(is_zero, 0, problem.dy).astype(dtype)
        check_sparse_matmul(run, full._replace(dy=dy), problem._replace(dy=dy), sparse)


@SPARSE_SHAPES
@DTYPE
@LOSS
def test_sparse_loss_matches_brute_force(run, shape, dtype, loss):
    batch, dense, columns, labels, fan_in = shape
    problem = make_problem(
        batch,
        dense + columns,
        labels,
        fan_in,
        dtype=dtype,
        index_dtype=np.int32 if fan_in % 2 else np.uint16,
        with_bias=labels != 70,
    )
    full, problem, sparse = sparsify(problem, dense)
    assert_loss(run_loss(run, problem, loss, SMALL, sparse), full, loss, dense)


@pytest.mark.parametrize("op", ["sgd", "adam"])
@LOSS
def test_sparse_step(run, op, loss):
    dense = 9
    problem = make_problem(70, 140, 130, 70)
    full, problem, sparse = sparsify(problem, dense)
    arrays = {"sparse": sparse, "rates": np.float32([0.1, 3, 20]), "key": np.zeros(4, np.uint32)}
    if op == "adam":
        for name in ("kernel", "bias"):
            zeros = np.zeros_like(getattr(problem, name))
            arrays |= {f"mu_{name}": zeros, f"nu_{name}": zeros}
    (value, d_x), new = run_step(run, f"fan_in_step.{op}", problem, loss, arrays)
    expected, _ = brute_force_loss(full, loss)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    exact = expected[1][:, :dense]
    np.testing.assert_allclose(d_x, exact, rtol=1e-4, atol=1e-6 * np.abs(exact).max())
    for name, gradient in zip(("kernel", "bias"), expected[2:], strict=True):
        change = -0.1 * gradient
        if op == "adam":
            mu, nu = 0.2 * gradient, 0.01 * gradient**2
            change = -0.1 * 3 * mu / (np.sqrt(20 * nu) + 1e-7)
            np.testing.assert_allclose(new[f"mu_{name}"], mu, rtol=1e-4, atol=1e-5 * np.abs(mu).max())
            np.testing.assert_allclose(new[f"nu_{name}"], nu, rtol=1e-4, atol=1e-5 * np.abs(nu).max())
        else:
            np.testing.assert_allclose(new[name], getattr(problem, name) + change, rtol=1e-6, atol=1e-6)
        untouched = gradient == 0
        assert np.any(untouched) == (name == "kernel")
        np.testing.assert_array_equal(new[name][untouched], getattr(problem, name)[untouched])


def test_sparse_sgd_step_bfloat16(run):
    problem = make_problem(70, 140, 130, 70, dtype=jnp.bfloat16)
    full, problem, sparse = sparsify(problem, 9)
    arrays = {"sparse": sparse, "rates": np.float32(100), "key": np.zeros(4, np.uint32)}
    _, new = run_step(run, "fan_in_step.sgd", problem, "bce", arrays)
    for name, gradient in zip(("kernel", "bias"), brute_force_loss(full, "bce")[0][2:], strict=True):
        exact = getattr(problem, name).astype(np.float64) - 100 * gradient
        error = np.abs(new[name].astype(np.float64) - exact)
        assert np.all(error <= 2**-7 * np.abs(exact) + 1e-4)


def test_sparse_step_with_empty_batch(run):
    problem = make_problem(0, 9, 70, 3)
    padding = np.zeros(2, np.int32)
    sparse = SparseInputs(padding, padding, np.ones(2, np.float32), 40)
    arrays = {"rates": np.ones(3, np.float32), "key": np.zeros(4, np.uint32), "sparse": sparse}
    results, new = run_step(run, "fan_in_step.sgd", problem, "bce", arrays)
    assert np.isnan(results[0])
    np.testing.assert_array_equal(new["kernel"], problem.kernel)


@SPARSE_SHAPES
@DTYPE
@pytest.mark.parametrize("labels_at_once", [50, 1000])
def test_sparse_top_k_matches_brute_force(run, shape, dtype, labels_at_once):
    batch, dense, columns, labels, fan_in = shape
    problem = make_problem(batch, dense + columns, labels, fan_in, dtype=dtype, integer_values=True)
    full, problem, sparse = sparsify(problem, dense, density=0.3)
    k = min(5, labels)
    actual = run_top_k(run, problem[:4], k, labels_at_once, sparse=sparse)
    assert_top_k(actual, brute_force_top_k(full, k))
