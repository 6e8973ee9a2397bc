"""The environment decides nothing: variables by which libraries would change a result are removed, or refused by name.

What a result depends on is in the command's settings and in its record. The variables of a launcher (`RANK`, `WORLD_SIZE`, `LOCAL_RANK`,
`MASTER_ADDR`, …) stay, as they say which process this is.
"""

import logging
import os
import re
import site
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

from cora_cli.errors import CoraError

# Precision, accumulation, compilation and device of accelerate, some of which the Trainer itself leaves behind for the next one.
_PREFIXES = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")
_OTHERS = (
    *("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"),  # products of float32 matrices in fewer bits
    *("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"),  # the same on a processor
    *("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"),  # what a pickle may contain
    *("XLA_USE_BF16", "XLA_DOWNCAST_BF16", "TRANSFORMERS_SDPA_FORCE_GQA"),
)
_OTHER_TRAININGS = {
    "ACCELERATE_USE_FSDP": "accelerate's own sharded training (use `cora train --shard fsdp` with torchrun)",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "another kind of parallelism",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker's training",
}
_PLACES = re.compile(r"(HF|TORCH\w*|TRITON|TRANSFORMERS|XDG|CUDA|NUMBA|TIKTOKEN)_\w+|MPLCONFIGDIR|TMPDIR")
"""Variables by which libraries find the places for their own files."""
# Cluster software sets these for its own purposes; torchrun and accelerate always set LOCAL_RANK too.
_PROCESS_COUNTS = ("RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def forget_settings() -> None:
    """Remove the variables from this process and from those that it starts.

    Raises `CoraError` for one that asks for a kind of training that `cora` does not have.
    """
    if sys.flags.optimize > 1:
        raise CoraError(
            "Python runs without docstrings, which transformers reads; unset the environment variable PYTHONOPTIMIZE, and leave out -OO"
        )
    for name, kind in _OTHER_TRAININGS.items():
        if os.environ.get(name, "").lower() in ("1", "true", "yes", "y", "t", "on"):
            raise CoraError(f"the environment variable {name} asks for {kind}, which cora does not support; unset it")
    for name in [*os.environ]:
        if name.startswith(_PREFIXES) or name in _OTHERS:
            del os.environ[name]
    if os.environ.get("TORCH_LOGS") == "":  # torch's own error at it, while it is imported, does not name it
        del os.environ["TORCH_LOGS"]
    if "LOCAL_RANK" in os.environ and "MASTER_ADDR" not in os.environ:
        raise CoraError(
            "the environment variable LOCAL_RANK says that a launcher started this process, but MASTER_ADDR is missing; unset LOCAL_RANK, or "
            "start it with torchrun"
        )
    if "LOCAL_RANK" not in os.environ:
        for name in _PROCESS_COUNTS:
            os.environ.pop(name, None)
        return
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        # Without the processes of this host, they are all of them.
        value = os.environ.get(name, os.environ.get("WORLD_SIZE", "") if name == "LOCAL_WORLD_SIZE" else "")
        if not (value.isascii() and value.isdecimal()):
            raise CoraError(
                f"the environment variable LOCAL_RANK says that a launcher started this process, but {name} is {value!r} and not an "
                "integer; unset LOCAL_RANK, or start it with torchrun"
            )


def launched_processes() -> int:
    """How many processes a launcher started for this command, of which this is one; 1 without a launcher."""
    return int(os.environ["WORLD_SIZE"]) if "LOCAL_RANK" in os.environ else 1


def is_first_process() -> bool:
    """Whether this process is the first of those that a launcher started; only that one prints results."""
    return os.environ.get("RANK", "0") == "0"


def folder_to_search() -> str | None:
    """The folder that PYTHONPATH must name so that a new Python finds this package; None where it is installed among others.

    PYTHONPATH comes before the standard library, whose modules the others may share a name with, as old backports do.
    """
    folder = str(Path(__file__).parents[1])
    return None if folder in (*site.getsitepackages(), site.getusersitepackages()) else folder


def quiet_libraries() -> None:
    """Silence the libraries' progress bars and warnings; `cora` reports progress and problems itself."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    # A library that sets up no logging has its warnings printed by Python itself.
    if logging.lastResort is not None:
        logging.lastResort.setLevel(logging.ERROR)
    # matplotlib complains about a home directory that it cannot write to, and then works without it; bitsandbytes, which PEFT imports, about a
    # package that some processors could use.
    for library in ("matplotlib", "bitsandbytes"):
        logging.getLogger(library).setLevel(logging.ERROR)
    # A user cannot fix one library's use of a deprecated function in another.
    warnings.filterwarnings("ignore", category=FutureWarning)
    # PEFT warns of shapes and ties in words about its own calls; what matters to a user is said by the commands.
    for library in ("peft", "transformers"):
        warnings.filterwarnings("ignore", module=rf"{library}\.")
    logging.getLogger("peft").setLevel(logging.ERROR)


def variable_behind(error: BaseException) -> str | None:
    """The name of the environment variable at which a library failed.

    It is set, and stands in the message with its value or with what it must be, or in a line of code that the error passed through; or it alone
    has the value that the message of an error during an import quotes.
    """
    said, frames = str(error), traceback.extract_tb(error.__traceback__)
    for name in re.findall(r"[A-Z][A-Z0-9]*_[A-Z0-9_]+", said):
        if os.environ.get(name, "") and (os.environ[name] in said or f"{name} must be " in said):
            return str(name)
    for frame in reversed(frames):
        for name in re.findall(r"(?:environ|getenv)\S*?[\"']([A-Z][A-Z0-9_]+)[\"']", frame.line or ""):
            if name in os.environ:
                return str(name)
    quoted = [name for name, value in os.environ.items() if said.endswith(f": {value!r}")]
    return quoted[0] if len(quoted) == 1 and any(frame.name == "<module>" for frame in frames[1:]) else None


def package_behind(error: BaseException) -> str | None:
    """What could not be imported, and why, where an import of a package raised the error; None for any other error.

    Packages come and go without the others: one that was built for another version of torch breaks whatever imports it if it is there.
    """
    chain = [error]  # accelerate raises an error from itself
    while (cause := chain[-1].__cause__) is not None and cause not in chain:
        chain.append(cause)
    first, said = chain[-1], " ".join(str(chain[-1]).split())[:200]
    frames = [frame for frame, _ in traceback.walk_tb(first.__traceback__) if frame.f_code.co_name == "<module>"]
    missing = first.name if isinstance(first, ModuleNotFoundError) else None
    if not frames and not missing:  # PEFT refuses versions of a package where it would use it
        return f"a package is missing or does not fit the others ({said})" if isinstance(first, ImportError) else None
    package = (missing or str(frames[-1].f_globals.get("__name__", ""))).partition(".")[0]
    if package in ("", "__main__", "cora_cli", "transformers_modules"):
        return None
    if "None" in said and (folder := _without_version()):
        return f"the package {folder.name.partition('-')[0]} is damaged: {folder} states no version ({said})"
    return f"the package {package} cannot be imported ({said})"


def _without_version() -> Path | None:
    """The folder of an installed package whose METADATA is empty or missing, as an interrupted installation leaves it: its version is None to others."""
    folders = (folder for place in sys.path for folder in sorted(Path(place or ".").glob("*.dist-info")))
    return next((folder for folder in folders if not _states_version(folder / "METADATA")), None)


def _states_version(metadata: Path) -> bool:
    try:
        text = metadata.read_text(encoding="utf-8", errors="replace")  # of old packages, in whatever encoding
    except OSError:
        return False
    return re.search(r"^Version: *\S", text, re.MULTILINE) is not None


def variable_of_path(path: str) -> str | None:
    """The variable that tells a library to write to this path, or to a folder above it; None if none does."""
    found = {
        name: value
        for name, value in os.environ.items()
        if _PLACES.fullmatch(name) and value.startswith("/") and Path(path).is_relative_to(value)
    }
    return max(found, key=lambda name: (len(found[name]), name), default=None)


def proxy_variable(url: str, reads_all: bool) -> str | None:
    """The variable that names the proxy through which a request to `url` goes; None if it goes there directly.

    `reads_all`: the client knows `all_proxy`, which Python's own does not.
    """
    from urllib.parse import urlsplit
    from urllib.request import getproxies_environment, proxy_bypass

    parts = urlsplit(url)
    if proxy_bypass(parts.netloc.rpartition("@")[2]):
        return None
    found = getproxies_environment()
    kind = next((kind for kind in (parts.scheme, *(["all"] if reads_all else [])) if found.get(kind)), None)
    names = (f"{kind}_proxy", f"{kind}_proxy".upper())
    return next((name for name in names if kind and os.environ.get(name) == found[kind]), None)


def by_proxy(url: str, reads_all: bool) -> str:
    """How a sentence ends that says that `url` was not reached: the variable of the proxy, without its value, which may hold a password."""
    name = proxy_variable(url, reads_all)
    return (
        f"; requests to it go through the proxy that {name} names, so correct or unset that variable if it is wrong"
        if name
        else ""
    )


def checked_proxy(url: str, kinds: Sequence[str] = ("http", "https"), reads_all: bool = False) -> str:
    """`by_proxy` of `url`. Raises `CoraError` for a proxy whose address can be none of these kinds."""
    from urllib.parse import urlsplit

    name = proxy_variable(url, reads_all)
    if name is None:
        return ""
    stated = os.environ[name]
    try:
        address = urlsplit(stated if "://" in stated else f"//{stated}", scheme="http")
        fits = bool(address.hostname) and address.port != 0 and address.scheme in kinds
    except ValueError:
        fits = False
    if not fits or not all("!" <= sign <= "~" for sign in stated):
        raise CoraError(
            f"the environment variable {name} is not the address of a proxy that can be used, such as http://proxy:3128; correct or unset it, or put "
            f"{urlsplit(url).hostname} into no_proxy"
        )
    return by_proxy(url, reads_all)


def behind_hub_error(error: Exception) -> str:
    """How a sentence ends that says that the hub was not reached: the variable that is the reason; empty where none is."""
    endpoint = os.environ.get("HF_ENDPOINT", "")
    if endpoint and not re.match("https?://.", endpoint):
        return f"; the environment variable HF_ENDPOINT is {endpoint!r}, which is no address such as https://huggingface.co; correct or unset it"
    if isinstance(error, UnicodeEncodeError):
        return "; the token for the hub holds letters that no token has; correct or unset HF_TOKEN, or log in again"
    if isinstance(error, OSError) and error.filename and (name := variable_of_path(os.fsdecode(error.filename))):
        return f"; the environment variable {name} names that place"
    return ""


def proxy_to_hub() -> str:
    """`by_proxy` of the Hugging Face hub; empty where it is asked for nothing."""
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE

    return "" if HF_HUB_OFFLINE else by_proxy(ENDPOINT, reads_all=True)
