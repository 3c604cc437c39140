"""Build script. Metadata lives in pyproject.toml; this file adds the optional C++ row kernels.

They are built against the installed torch, so only where pip does not hide it:

    pip install --no-build-isolation .

Without torch or a C++ compiler, or where the build fails, they are left out. VAR_KERNELS_BUILD_EXT=1 makes a failure an
error, VAR_KERNELS_BUILD_EXT=0 leaves them out.
VAR_KERNELS_SANITIZE=address,undefined builds them with gcc's sanitizers and AMX emulated (csrc/sanitize.sh).
"""

import os
import shutil
from pathlib import Path

from setuptools import setup

# torch's stable ABI as of 2.11: the binary runs on that version and later ones.
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]


def extension() -> dict:
    """Arguments of setup() that build csrc/; none where that is not wanted or not possible."""
    wanted = os.environ.get("VAR_KERNELS_BUILD_EXT")
    compilers = (os.environ.get("CXX", "c++"), "g++", "clang++", "cl")
    if wanted == "0" or (wanted != "1" and not any(map(shutil.which, compilers))):
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        if wanted == "1":
            raise
        return {}

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
        optional=wanted != "1",
    )
    return {
        "ext_modules": [native],
        "cmdclass": {"build_ext": BuildExtension.with_options(use_ninja=False)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**extension())
