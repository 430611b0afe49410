"""What the GPU tests share: the vendor's settings, made before CUDA is used, and operands."""

import pytest
import torch

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(scope="session", autouse=True)
def prepared(tmp_path_factory):
    """The process as a server's worker: settings made, certificates in a folder of its own."""
    from batch_invariant_ops import vendor

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BATCH_INVARIANT_CACHE", str(tmp_path_factory.mktemp("certificates")))
        if torch.cuda.is_available():
            vendor.prepare()
        yield


@pytest.fixture
def values():
    """values(*shape, dtype=..., seed=...): the same normal numbers on the GPU in every run."""

    def make(*shape, dtype=torch.float32, seed=0):
        generator = torch.Generator(device="cuda").manual_seed(seed)
        return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

    return make


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    return request.param
