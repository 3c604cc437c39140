"""Build script. Metadata lives in pyproject.toml; this file adds the optional C++ row kernels.

They are built against the installed torch, and only when asked for:

    VAR_KERNELS_BUILD_EXT=1 pip install --no-build-isolation --no-deps -e .

VAR_KERNELS_SANITIZE=address,undefined builds them with gcc's sanitizers and AMX emulated (csrc/sanitize.sh).
"""

import os
from pathlib import Path

from setuptools import setup

# torch's stable ABI as of 2.11: the binary runs on that version and later ones.
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]


def extension() -> dict:
    """Arguments of setup() that build csrc/; none unless VAR_KERNELS_BUILD_EXT=1."""
    if os.environ.get("VAR_KERNELS_BUILD_EXT") != "1":
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    csrc = Path("csrc")
    sanitizers = os.environ.get("VAR_KERNELS_SANITIZE")
    checked = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-g", "-O1"] if sanitizers else []
    emulated = ["-include", "tests/amx_emulation.h"] if sanitizers else []
    native = CppExtension(
        "var_kernels.kernels._native",
        [str(path) for path in sorted(csrc.glob("*.cpp"))],
        depends=[str(path) for path in sorted(csrc.glob("*.h")) + sorted(csrc.glob("*.inc"))],
        extra_compile_args=["-O3", "-ffp-contract=fast", *STABLE_ABI, *checked, *emulated],
        extra_link_args=checked,
        py_limited_api=True,
    )
    return {
        "ext_modules": [native],
        "cmdclass": {"build_ext": BuildExtension.with_options(use_ninja=False)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**extension())
