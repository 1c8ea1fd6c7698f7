"""The calls of other packages' Triton launchers that `gpu_peers.py` compiles, with tensors of zeros on this CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from crosstile.kernels.tiles.targets import Target, get_target

from .gpus import GPUS
from .paged_shapes import PagedAttentionShape
from .programs import Direction
from .shapes import get_shape
from .source_parts import load_parts


@dataclass(frozen=True)
class Peers:
    """The folder with the packages, and the chip that they are told they run on."""

    folder: Path
    target_name: str

    @cached_property
    def target(self) -> Target:
        """The chip."""
        return get_target(self.target_name)

    @property
    def on_amd(self) -> bool:
        """Whether it is AMD's."""
        return self.target.platform == "rocm"

    @property
    def has_copy_engine(self) -> bool:
        """Whether tensor descriptors are more than addresses there."""
        return self.target.capability >= 90

    def tutorial(self, name: str, function: str) -> Any:
        """A function or class of one of Triton's tutorials, by the file's name."""
        given = {
            "is_cuda": lambda: not self.on_amd,
            "is_hip": lambda: self.on_amd,
            "is_hopper": lambda: self.target_name == "sm_90",
            "is_blackwell": lambda: self.target_name == "sm_100",
            "supports_host_descriptor": lambda: False,
        }
        return load_parts(self.folder / "tutorials" / name, [function], given)[function]

    def vllm(self, name: str, function: str) -> Callable[..., Any]:
        """A launcher of vLLM's attention, by the file's name."""
        (source,) = self.folder.glob("vllm-*/vllm")
        place = source / "v1/attention/ops"
        helpers = load_parts(place / "triton_attention_helpers.py", _HELPERS, _triton())
        modes = load_parts(source / "v1/kv_cache_interface.py", ["KVQuantMode"], {})
        given = {
            **_triton(),
            **{helper: helpers[helper] for helper in _HELPERS},
            "KVQuantMode": modes["KVQuantMode"],
            "RCP_LN2": load_parts(source / "utils/math_utils.py", ["RCP_LN2"], {})["RCP_LN2"],
            "envs": SimpleNamespace(VLLM_BATCH_INVARIANT=False),
            "logger": None,
            "_prefer_narrow_kv_tile": lambda: False,  # what AMD's consumer chips prefer
            "current_platform": SimpleNamespace(
                fp8_dtype=lambda: import_module("torch").float8_e4m3fn,
                is_rocm=lambda: self.on_amd,
                is_cuda_alike=lambda: True,
                has_device_capability=lambda least: True,
                is_device_capability_family=lambda family: self.target.capability == family,
            ),
        }
        launcher: Callable[..., Any] = load_parts(place / name, [function], given)[function]
        return launcher

    @contextmanager
    def present(self) -> Iterator[None]:
        """FLA is told the chip's shared memory, by which it chooses tiles, and torch how many programs run at once."""
        backend = import_module("fla.utils.hardware").Backend

        def enough(arch: str = "none", index: int | None = 0) -> bool:
            return bool(self.target.on_chip_bytes >= backend.get_shared_memory(arch))

        major, minor = divmod(self.target.capability, 10)
        processors = GPUS[self.target_name].processors
        properties = SimpleNamespace(multi_processor_count=processors, major=major, minor=minor)
        with (
            patch.object(import_module("fla.ops.attn.parallel"), "check_shared_mem", enough),
            patch("torch.cuda.get_device_properties", lambda device=None: properties),
        ):
            yield


_HELPERS = (
    "apply_alibi_to_score",
    "apply_softcap",
    "cdiv_fn",
    "compute_kv_seq_mask",
    "compute_tile_loop_bounds",
    "find_seq_idx",
    "init_softmax_M",
    "load_qq_bias_tile",
    "resolve_seq_and_query_len",
    "softmax_step",
    "store_segm_reduce_scalars",
)


def _triton() -> dict[str, Any]:
    return {"triton": import_module("triton"), "tl": import_module("triton.language")}


def _tensor(*shape: int, dtype: str = "bfloat16") -> Any:
    import torch

    return torch.zeros(shape, dtype=getattr(torch, dtype))


@dataclass(frozen=True)
class Contest:
    """One call that ours and a peer both do, or with an empty `op` one that ours have no counterpart of.

    Attributes:
        name: as the table has it.
        op, shape, direction, dtype: of ours.
        peer: the package.
        launch: calls the peer's launcher.
        in_place: whether the peer writes over what it reads, which then moves twice.
    """

    name: str
    op: str
    shape: str
    direction: Direction
    peer: str
    launch: Callable[[Peers], Any]
    in_place: bool = False
    dtype: str = "bfloat16"


def _fla(peers: Peers) -> Any:
    module = import_module("fla.ops.attn.parallel")
    q, kv = _tensor(1, 4096, 32, 128), _tensor(1, 4096, 8, 128)
    return module.parallel_attn_fwd(q, kv, kv, None, None, 128**-0.5)


def _fla_backward(peers: Peers) -> Any:
    module = import_module("fla.ops.attn.parallel")
    q, kv, lse = _tensor(1, 4096, 32, 128), _tensor(1, 4096, 8, 128), _tensor(1, 4096, 32, dtype="float32")
    return module.parallel_attn_bwd(q, kv, kv, q, None, lse, q, None, 128**-0.5)


def _vllm_prefill(peers: Peers) -> Any:
    import torch

    launch = peers.vllm("triton_prefill_attention.py", "context_attention_fwd")
    q, kv = _tensor(4096, 32, 128), _tensor(4096, 8, 128)
    return launch(q, kv, kv, q, torch.tensor([0]), torch.tensor([4096]), 4096)


def _vllm_paged(shape_name: str) -> Callable[[Peers], Any]:
    def launch(peers: Peers) -> Any:
        import torch

        shape = get_shape(shape_name)
        assert isinstance(shape, PagedAttentionShape)
        unified = peers.vllm("triton_unified_attention.py", "unified_attention")
        segments, tokens = 16, shape.batch * shape.q_len  # NUM_PAR_SOFTMAX_SEGMENTS of its backend
        steering = {name: torch.tensor(values, dtype=torch.int32) for name, values in shape.integers().items()}
        pages = _tensor(*shape.arrays("bfloat16")["k_pages"][0])
        q = _tensor(tokens, shape.q_heads, shape.head_dim)
        partial = tokens, shape.q_heads, segments
        return unified(
            q=q,
            k=pages,
            v=pages.clone(),
            out=torch.zeros_like(q),
            cu_seqlens_q=torch.arange(shape.batch + 1, dtype=torch.int32) * shape.q_len,
            max_seqlen_q=shape.q_len,
            seqused_k=steering["lengths"],
            max_seqlen_k=shape.kv_len,
            softmax_scale=shape.head_dim**-0.5,
            causal=True,
            window_size=(-1, -1),
            block_table=steering["page_table"],
            softcap=0.0,
            q_descale=None,
            k_descale=None,
            v_descale=None,
            seq_threshold_3D=128 // shape.kv_heads,  # MIN_LAUNCH_GRID_SIZE_2D
            num_par_softmax_segments=segments,
            softmax_segm_output=_tensor(*partial, shape.head_dim, dtype="float32"),
            softmax_segm_max=_tensor(*partial, dtype="float32"),
            softmax_segm_expsum=_tensor(*partial, dtype="float32"),
        )

    return launch


_FUSED = "06-fused-attention.py"
_HEADS = 1, 16, 4096, 128  # causal-4k-mha's


def _tutorial_attention(peers: Peers) -> Any:
    function = peers.tutorial(_FUSED, "_attention")
    q = _tensor(*_HEADS, dtype="float16")
    kept = SimpleNamespace(save_for_backward=lambda *tensors: None)
    # Of warps that run different code the model would count products and bytes alone.
    return function.forward(kept, q, q, q, True, 128**-0.5, warp_specialize=False)


def _tutorial_attention_backward(peers: Peers) -> Any:
    function = peers.tutorial(_FUSED, "_attention")
    q = _tensor(*_HEADS, dtype="float16")
    saved = q, q, q, q, _tensor(*_HEADS[:3], dtype="float32")
    return function.backward(SimpleNamespace(saved_tensors=saved, sm_scale=128**-0.5, HEAD_DIM=128, causal=True), q)


def _tutorial_product(peers: Peers) -> Any:
    a = _tensor(4096, 4096, dtype="float16")
    return peers.tutorial("03-matrix-multiplication.py", "matmul")(a, a)


def _tutorial_persistent(peers: Peers) -> Any:
    a, name = _tensor(4096, 4096, dtype="float16"), "09-persistent-matmul.py"
    if peers.has_copy_engine:
        product = peers.tutorial(name, "matmul_descriptor_persistent")
        return product(a, a, warp_specialize=peers.target_name == "sm_100")  # whose second matrix is [n, k]
    return peers.tutorial(name, "matmul_persistent")(a, a.T)


def _norm(peers: Peers) -> Any:
    module = import_module("liger_kernel.ops.fused_add_rms_norm")
    return module.fused_add_rms_norm_forward(
        _tensor(4096, 4096), _tensor(4096, 4096), _tensor(4096), 1e-6, 0.0, "llama"
    )


def _rotary(peers: Peers) -> Any:
    module = import_module("liger_kernel.ops.rope")
    tables = _tensor(1, 4096, 128), _tensor(1, 4096, 128)
    return module.rope_forward(_tensor(1, 32, 4096, 128), _tensor(1, 8, 4096, 128), *tables)


def _cross_entropy(peers: Peers) -> Any:
    module = import_module("liger_kernel.ops.cross_entropy")
    targets = _tensor(1024, dtype="int64")
    return module.cross_entropy_forward(_tensor(1024, 128256), targets, None, -100, 0.0, 0.0, "mean", None, False)


def _swiglu(peers: Peers) -> Any:
    module = import_module("liger_kernel.ops.swiglu")
    return module.swiglu_forward(_tensor(4096, 14336), _tensor(4096, 14336))


_PAGED, _CHUNK, _MHA = "llama-3-8b-paged", "llama-3-8b-chunk-16", "causal-4k-mha"
_SQUARE, _LINEAR = "square-4096", "square-4096-linear"

CONTESTS = (
    Contest("attention", "attention", "llama-3-8b", "forward", "FLA", _fla),
    Contest("attention, backward", "attention", "llama-3-8b", "backward", "FLA", _fla_backward),
    Contest("attention, prefill", "attention", "llama-3-8b", "forward", "vLLM", _vllm_prefill),
    Contest("attention of 16 heads", "attention", _MHA, "forward", "tutorial 06", _tutorial_attention, dtype="float16"),
    Contest(
        "attention of 16 heads, backward",
        "attention",
        _MHA,
        "backward",
        "tutorial 06",
        _tutorial_attention_backward,
        dtype="float16",
    ),
    Contest("paged decoding", "paged_attention", _PAGED, "forward", "vLLM", _vllm_paged(_PAGED)),
    Contest("paged prefill, 8 × 128", "paged_attention", _CHUNK, "forward", "vLLM", _vllm_paged(_CHUNK)),
    Contest("4096³", "matmul", _SQUARE, "forward", "tutorial 03", _tutorial_product, dtype="float16"),
    Contest("4096³, persistent", "matmul", _LINEAR, "forward", "tutorial 09", _tutorial_persistent, dtype="float16"),
    Contest("rms_norm of a sum", "norm", "llama-3-8b-norm", "forward", "Liger", _norm),
    Contest("rotary of q and k", "rotary", "llama-3-8b-rotary", "forward", "Liger", _rotary, in_place=True),
    Contest("cross-entropy of logits", "", "", "forward", "Liger", _cross_entropy, in_place=True),
    Contest("silu(a) * b", "", "", "forward", "Liger", _swiglu),
)
