"""Drawn completions on disk, each iteration whole. A run that was killed while it drew draws the same again.

folder/iteration-00003.jsonl          a prompt a line: rows that training reads too (docs/data.md), with their token ids
folder/iteration-00003.safetensors    log-probs under the policy and the reference; settings and metrics as metadata
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor

from var_kernels.integrations.data.forms import Text
from var_kernels.integrations.files import atomic_write


@dataclass
class Drawn:
    """A prompt with the completions that were drawn for it. The lists of a prompt's completions run parallel."""

    prompt: Text
    completions: list[Text]
    rewards: list[float] | None
    where: str
    prompt_ids: list[int]
    completion_ids: list[list[int]]
    completion_logps: list[list[float]] | None = None  # of their tokens, where the sampler says at what it drew them


@dataclass
class Iteration:
    """Everything that training on an iteration needs, and what was measured on it."""

    settings: dict  # what the draws depend on besides the policy
    policy: str  # hash of the weights that drew
    drawn: list[Drawn]
    columns: dict[str, Tensor] = field(default_factory=dict)  # (rows,)
    token_columns: dict[str, Tensor] = field(default_factory=dict)  # (tokens,)
    metrics: dict[str, float] = field(default_factory=dict)


class Buffer:
    """The iterations of a run in a folder. Every file appears whole or not at all."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)

    def path(self, iteration: int) -> Path:
        return self.folder / f"iteration-{iteration:05d}.jsonl"

    def write(self, iteration: int, content: Iteration) -> None:
        """The log-probs first: an iteration is there once its jsonl is, and theirs names it."""
        from safetensors.torch import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(iteration)
        lines = []
        for drawn in content.drawn:
            row = asdict(drawn)
            for name in ("rewards", "completion_logps"):
                if row[name] is None:
                    del row[name]
            lines.append(json.dumps(row) + "\n")
        data = "".join(lines).encode()
        metadata = {
            "settings": json.dumps(content.settings),
            "policy": content.policy,
            "metrics": json.dumps(content.metrics),
            "rows": hashlib.sha256(data).hexdigest(),
        }
        tensors = {f"row.{name}": values.contiguous() for name, values in content.columns.items()}
        tensors |= {f"token.{name}": values.contiguous() for name, values in content.token_columns.items()}
        with atomic_write(path.with_suffix(".safetensors")) as temporary:
            save_file(tensors, temporary, metadata)
        with atomic_write(path) as temporary:
            temporary.write_bytes(data)

    def read(self, iteration: int) -> Iteration | None:
        """None where it is not there, or not whole."""
        from safetensors import SafetensorError, safe_open

        path = self.path(iteration)
        try:
            data = path.read_bytes()
            with safe_open(path.with_suffix(".safetensors"), "pt") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            if metadata["rows"] != hashlib.sha256(data).hexdigest():
                return None
            rows = [json.loads(line) for line in data.decode().splitlines()]
            return Iteration(
                settings=json.loads(metadata["settings"]),
                policy=metadata["policy"],
                drawn=[Drawn(**{"rewards": None, **row}) for row in rows],
                columns={n.removeprefix("row."): v for n, v in tensors.items() if n.startswith("row.")},
                token_columns={n.removeprefix("token."): v for n, v in tensors.items() if n.startswith("token.")},
                metrics=json.loads(metadata["metrics"]),
            )
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):  # missing or damaged: drawn anew
            return None
