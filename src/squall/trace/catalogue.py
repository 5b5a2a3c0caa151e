"""The public data sets that `squall fetch` knows: where they lie, under which licence, and what their bytes hash to."""

from dataclasses import dataclass

from squall.errors import InputError

_BURSTGPT = "https://github.com/HPMLL/BurstGPT/releases/download/v2.0"
_BURSTGPT_GIT = "https://raw.githubusercontent.com/HPMLL/BurstGPT/main/data"
_AZURE_2023 = "https://raw.githubusercontent.com/Azure/AzurePublicDataset/master/data"
_AZURE_2024 = "https://azurepublicdatasettraces.blob.core.windows.net/azurellminfererencetrace"
_MOONCAKE = "https://raw.githubusercontent.com/kvcache-ai/Mooncake/main/FAST25-release/traces"
_RAGPULSE = "https://raw.githubusercontent.com/flashserve/RAGPulse/main/data"
_SERVEGEN = "https://raw.githubusercontent.com/alibaba/ServeGen/main/data/reason"

SERVEGEN_CLIENTS = 73


@dataclass(frozen=True)
class PublicFile:
    """One file of a data set: its path below the data set's address, and what is known of its bytes."""

    path: str
    size: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class DataSet:
    """One data set under the name that `fetch` takes. More than one file: `folder` holds them."""

    name: str
    title: str
    licence: str
    url: str
    files: tuple[PublicFile, ...]
    folder: str | None = None

    @property
    def size(self) -> int | None:
        """Bytes of all files, if they are known."""
        sizes = [file.size for file in self.files if file.size is not None]
        return sum(sizes) if len(sizes) == len(self.files) else None


def _one(name: str, title: str, licence: str, url: str, *file: str | int | None) -> DataSet:
    return DataSet(name, title, licence, url, (PublicFile(*file),))  # type: ignore[arg-type]


# Sizes and hashes of BurstGPT: release v2.0 (2026-01-15), computed by independent readers of the files; of Azure 2023
# and Mooncake: the files of their repositories, by two readers each. None: nobody has published it.
_DATA_SETS = (
    _one(
        "burstgpt-1",
        "BurstGPT part 1, days 0-60, with failures",
        "CC BY 4.0",
        _BURSTGPT,
        "BurstGPT_1.csv",
        52_283_111,
        "4bb3783693d0a435686fbfc885615d2349bd067239079fa4b749f2e679e12122",
    ),
    _one(
        "burstgpt-1-git",
        "the same from the git repository (LF line ends)",
        "CC BY 4.0",
        _BURSTGPT_GIT,
        "BurstGPT_1.csv",
        50_853_373,
        "46fc9480ef0b748ecb2b51d512ff08c196b031782cbe6f78e28044d768e86d5a",
    ),
    _one(
        "burstgpt-1-without-fails",
        "BurstGPT part 1, failures removed",
        "CC BY 4.0",
        _BURSTGPT,
        "BurstGPT_without_fails_1.csv",
        51_429_517,
        "a4d068a7113ec0290e74063a1b3447dc6001a30e4298eb313581b71006dda1f4",
    ),
    _one(
        "burstgpt-2",
        "BurstGPT part 2, days 61-120, with failures",
        "CC BY 4.0",
        _BURSTGPT,
        "BurstGPT_2.csv",
        144_819_209,
        "44bf5942b03fca42c01a226a545ad3a750ec62688faecd67b6831c56a8928bf7",
    ),
    _one(
        "burstgpt-2-without-fails",
        "BurstGPT part 2, failures removed",
        "CC BY 4.0",
        _BURSTGPT,
        "BurstGPT_without_fails_2.csv",
        142_376_815,
        "56193aa9b2bb26128ded43d2d29a960df6bf5af062bcfc9b005f3fcaa4e6e501",
    ),
    _one(
        "burstgpt-3",
        "BurstGPT part 3, days 225-334, with failures, sessions and elapsed times",
        "CC BY 4.0",
        _BURSTGPT,
        "BurstGPT_3.csv",
        231_682_327,
        "2299986a07388aa303ec2c41d1131e756db650a39ed6ef9dfe7cc3d7f9a43b8f",
    ),
    _one(
        "burstgpt-3-without-fails",
        "BurstGPT part 3, failures removed",
        "CC BY 4.0",
        _BURSTGPT,
        "BurstGPT_without_fails_3.csv",
        217_312_026,
        "3326259f9efb11845bc5ef85fa97e6f691050b0974621c91ef22acd566c43a40",
    ),
    _one(
        "azure-2023-conv",
        "Azure 2023, an hour of a conversation service",
        "CC BY 4.0",
        _AZURE_2023,
        "AzureLLMInferenceTrace_conv.csv",
        719_188,
        "2f1e5b666d4e3055fdbba98598ce2ec307767b9064e03e2fa46676dbcc7d0bf8",
    ),
    _one(
        "azure-2023-code",
        "Azure 2023, an hour of a coding service",
        "CC BY 4.0",
        _AZURE_2023,
        "AzureLLMInferenceTrace_code.csv",
    ),
    _one(
        "azure-2024-conv",
        "Azure 2024, a week of conversation",
        "CC BY 4.0",
        _AZURE_2024,
        "AzureLLMInferenceTrace_conv_1week.csv",
    ),
    _one(
        "azure-2024-code",
        "Azure 2024, a week of coding",
        "CC BY 4.0",
        _AZURE_2024,
        "AzureLLMInferenceTrace_code_1week.csv",
    ),
    _one(
        "mooncake-conversation",
        "Mooncake FAST'25, an hour of conversation, with block hashes",
        "Apache-2.0",
        _MOONCAKE,
        "conversation_trace.jsonl",
        3_029_533,
        "b8cbb061a85206d729d91cdc2981f43c9e0d99209dce588d3af5f7934408b9df",
    ),
    _one(
        "mooncake-toolagent",
        "Mooncake FAST'25, an hour of tools and agents",
        "Apache-2.0",
        _MOONCAKE,
        "toolagent_trace.jsonl",
    ),
    _one(
        "mooncake-synthetic",
        "Mooncake FAST'25, the synthetic mix",
        "Apache-2.0",
        _MOONCAKE,
        "synthetic_trace.jsonl",
    ),
    _one("ragpulse", "RAGPulse, a week of a campus RAG service, with sessions", "MIT", _RAGPULSE, "0_trace.jsonl"),
    DataSet(
        "servegen-deepseek-r1",
        f"ServeGen, {SERVEGEN_CLIENTS} clients of a reasoning model (fits, not requests)",
        "Apache-2.0",
        _SERVEGEN,
        tuple(
            PublicFile(f"deepseek-r1/chunk-{client}-{kind}")
            for client in range(SERVEGEN_CLIENTS)
            for kind in ("trace.csv", "dataset.json")
        ),
        "deepseek-r1",
    ),
)
CATALOGUE = {data_set.name: data_set for data_set in _DATA_SETS}


def data_set(name: str) -> DataSet:
    """The data set called `name` (`burstgpt-1`), or whose one file is (`BurstGPT_1.csv`). Raises InputError."""
    if name in CATALOGUE:
        return CATALOGUE[name]
    for candidate in _DATA_SETS:
        if candidate.folder is None and candidate.files[0].path == name:
            return candidate
    raise InputError(f"{name}: no such data set; known are {', '.join(CATALOGUE)}.")


def known_by_hash(sha256: str) -> DataSet | None:
    """The published file that has this sha256, or None."""
    return next((known for known in _DATA_SETS if known.folder is None and known.files[0].sha256 == sha256), None)


def known_by_file_name(name: str) -> DataSet | None:
    """The data set whose one file is called `name`, if its sha256 is known, or None."""
    return next(
        (
            known
            for known in _DATA_SETS
            if known.folder is None and known.files[0].sha256 is not None and known.files[0].path == name
        ),
        None,
    )
