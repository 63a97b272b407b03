import hypothesis
import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import scipy.sparse
from hypothesis import strategies as st
from small_files import LABELS, is_memory_mapped

from sparse_xmc.data import storage


class TestCsr:
    @hypothesis.given(
        dense=hnp.arrays(
            st.sampled_from([bool, np.uint8, np.float32]), hnp.array_shapes(min_dims=2, max_dims=2)
        )
    )
    def test_round_trip(self, tmp_path_factory, dense):
        directory = tmp_path_factory.mktemp("csr") / "new" / "matrix"
        matrix = scipy.sparse.csr_array(dense)
        storage.save_csr(directory, matrix)
        loaded = storage.load_csr(directory)
        np.testing.assert_array_equal(loaded.toarray(), dense, strict=True)
        assert loaded.indices.dtype == matrix.indices.dtype

    def test_memory_maps_all_arrays(self, tmp_path):
        storage.save_csr(tmp_path, LABELS)
        loaded = storage.load_csr(tmp_path)
        for array in (loaded.data, loaded.indices, loaded.indptr):
            assert is_memory_mapped(array)
            assert not array.flags.writeable

    def test_inconsistent_files_raise(self, tmp_path):
        storage.save_csr(tmp_path, LABELS)
        np.save(tmp_path / "indices.npy", LABELS.indices[:-1])
        with pytest.raises(ValueError, match=f"{tmp_path.name}: not a saved CSR matrix"):
            storage.load_csr(tmp_path)
