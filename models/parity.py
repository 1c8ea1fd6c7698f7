"""Each family beside transformers: small random models, their logits, gradients and greedy tokens in every framework.

`python -m crosstile.models.parity` prints the table and fails where a cell does. Nothing is downloaded: transformers
builds a model, draws its weights, and saves it; `load` reads it.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .arrays import FRAMEWORKS, Tree, like, to_numpy, tree_leaves
from .checkpoint import load, save
from .config import Config
from .generate import generate
from .parity_cases import CASES, SIZES
from .transformer import forward, loss

LOGITS_BAR = 1e-5  # of the largest element
GRADIENTS_BAR = 2e-5  # of each parameter's largest: through twice as many products
SAVED_BAR = 1e-6  # bit-equal but for names of an activation that transformers computes in two ways
PROMPT, NEW_TOKENS = 9, 12
KINDS = ("logits", "gradients", "generation", "saved")


@dataclass
class Subject:
    """A model of transformers with random weights, and what it computes of some tokens.

    Attributes:
        model: of transformers, in float32 and eager.
        folder: where it was saved.
        tokens: int32 `[batch, seq]`.
    """

    model: Any
    folder: Path
    tokens: np.ndarray
    _known: dict[str, Any] = field(default_factory=dict)

    def logits(self) -> np.ndarray:
        """Of every token."""
        return self._once("logits", lambda: _logits(self.model, self.tokens))

    def gradients(self) -> Tree:
        """Of the training loss, in the layout of `crosstile.models`: saved as if they were weights, and loaded."""
        return self._once("gradients", lambda: self._gradients(self.model))

    def rounding(self) -> float:
        """How far transformers' own gradients in float32 are from those in float64."""
        wide = self._once("gradients in float64", lambda: self._gradients(copy.deepcopy(self.model).double()))
        return _distance(_with_gradient(self.gradients()), _with_gradient(wide))

    def generated(self) -> np.ndarray:
        """The greedy continuation of the first tokens."""
        return self._once("generated", self._generated)

    def _once(self, name: str, compute: Callable[[], Any]) -> Any:
        if name not in self._known:
            self._known[name] = compute()
        return self._known[name]

    def _gradients(self, model: Any) -> Tree:
        import torch

        config = Config.from_pretrained(self.folder)
        balance = config.experts.loss if config.experts else 0.0
        model, rows = copy.deepcopy(model), torch.as_tensor(self.tokens).long()
        out = model(rows[:, :-1], **({"output_router_logits": True} if balance else {}))
        total = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), rows[:, 1:].flatten())
        (total + balance * out.aux_loss if balance else total).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            return load(folder, "numpy")[0]

    def _generated(self) -> np.ndarray:
        import torch

        prompt = torch.as_tensor(self.tokens[:, :PROMPT]).long()
        with torch.no_grad():
            options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            return self.model.generate(prompt, max_new_tokens=NEW_TOKENS, **options).numpy()


def subject(name: str, folder: Path) -> Subject:
    """The case of that name of `parity_cases`, built and saved."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    family, options = name.partition(":")[0], CASES[name]
    torch.manual_seed(len(name))
    config = CONFIG_MAPPING[family](**{**SIZES, **options})
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_config(config, **eager).float().eval()
    _draw(model)
    model.save_pretrained(folder)
    tokens = np.random.default_rng(7).integers(3, SIZES["vocab_size"], (2, 25)).astype(np.int32)
    return Subject(model, folder, tokens)


def _draw(model: Any) -> None:
    """Weights large enough that every part shows: norms that are not all ones, biases and sinks that are not 0."""
    import torch

    corrections = [(name, buffer) for name, buffer in model.named_buffers() if name.endswith("correction_bias")]
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *corrections]:
            noise = torch.randn_like(parameter)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(0.3 * noise)
            elif parameter.ndim == 1 or name.endswith("bias"):
                parameter.copy_(0.4 * noise)
            else:
                parameter.copy_(noise * (0.05 if "embed" in name else 1.2 * parameter.shape[-1] ** -0.5))


def measure(subject: Subject, framework: str, kind: str) -> float | None:
    """How far apart the two are: max-relative, of tokens how many differ; None where there is nothing to compare."""
    if kind == "gradients" and framework == "numpy":
        return None  # NumPy takes no gradients
    params, config = load(subject.folder, framework)
    tokens = like(subject.tokens, params["embedding"])
    if kind == "logits":
        return max_relative(to_numpy(_compiled(forward, framework)(params, tokens, config)), subject.logits())
    if kind == "gradients":
        return _distance(_gradients(params, tokens, config, framework), _with_gradient(subject.gradients()))
    if kind == "generation":
        mine = to_numpy(generate(params, config, subject.tokens[:, :PROMPT], NEW_TOKENS))
        return float((mine != subject.generated()).sum())
    with tempfile.TemporaryDirectory() as folder:
        save(params, config, folder)
        again = type(subject.model).from_pretrained(folder, attn_implementation="eager", experts_implementation="eager")
        return max_relative(_logits(again.eval(), subject.tokens), subject.logits())


def passes(subject: Subject, error: float, kind: str) -> bool:
    """Whether the measured distance is one that two right programs may have.

    Of gradients that cancel, such as a key's bias, transformers' own rounding may be over the bar; then twice that is.
    """
    bar = {"logits": LOGITS_BAR, "gradients": GRADIENTS_BAR, "saved": SAVED_BAR}.get(kind, 0.0)
    return error <= bar or (kind == "gradients" and error <= 2 * subject.rounding())


def _distance(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> float:
    """The largest of all parameters'."""
    return max(max_relative(found[path], array) for path, array in wanted.items())


def max_relative(got: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference, as a share of the largest element."""
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    if got.shape != wanted.shape:
        raise ValueError(f"got {got.shape} where {wanted.shape} was wanted")
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


def _logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.as_tensor(tokens).long()).logits.numpy()


def _compiled(function: Callable[..., Any], framework: str) -> Callable[..., Any]:
    """The function of (params, tokens, config), one program in JAX."""
    if framework != "jax":
        return function
    import jax

    return jax.jit(function, static_argnums=2)


def _gradients(params: Tree, tokens: Any, config: Config, framework: str) -> dict[str, np.ndarray]:
    leaves = tree_leaves(params)
    if framework == "jax":
        import jax

        found = tree_leaves(_compiled(jax.grad(loss), framework)(params, tokens, config))
        return {path: np.asarray(array) for path, array in found.items()}
    for array in leaves.values():
        array.requires_grad_()
    loss(params, tokens, config).backward()
    return {path: array.grad.numpy() for path, array in _with_gradient(leaves).items()}


def _with_gradient(tree: Tree) -> dict[str, Any]:
    """All but the bias by which experts are chosen, which no gradient reaches."""
    return {path: array for path, array in tree_leaves(tree).items() if not path.endswith("correction_bias")}


def main(names: list[str]) -> bool:
    """Print the table of those cases, or of all; whether every cell passes."""
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table
    from torch import set_num_threads

    set_num_threads(1)  # so small products are slower on more
    unknown = [name for name in names if name not in CASES]
    if unknown:
        raise ValueError(f"case: got {unknown[0]!r}; it must be one of {', '.join(CASES)}")
    table = Table(title="crosstile.models beside transformers: max-relative error, or tokens that differ")
    table.add_column("case")
    for framework in FRAMEWORKS:
        for kind in KINDS:
            table.add_column(f"{framework}\n{kind}", justify="right")
    console, failed = Console(width=160), []
    with Live(table, console=console):
        for name in names or list(CASES):
            with tempfile.TemporaryDirectory() as folder:
                one = subject(name, Path(folder))
                cells = {
                    f"{name}, {framework}, {kind}": _cell(one, framework, kind)
                    for framework in FRAMEWORKS
                    for kind in KINDS
                }
            table.add_row(name, *(text for text, _ in cells.values()))
            failed += [cell for cell, (_, fine) in cells.items() if not fine]
    console.print(
        f"\n{table.row_count} cases, [red]over the bar:[/] {'; '.join(failed)}" if failed else "\nall is well"
    )
    return not failed


def _cell(one: Subject, framework: str, kind: str) -> tuple[str, bool]:
    """What the table shows, and whether it passes."""
    error = measure(one, framework, kind)
    if error is None:
        return "–", True
    fine = passes(one, error, kind)
    text = f"{error:.0f}" if kind == "generation" or not error else f"{error:.0e}"
    return f"[{'green' if fine else 'red'}]{text}[/]", fine


if __name__ == "__main__":
    sys.exit(not main(sys.argv[1:]))
