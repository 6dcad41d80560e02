"""What a file is, by its name: records, a whole document, neither. Nothing is guessed.

    jsonl        *.jsonl *.ndjson, and *.json that is compressed: a document a line
    parquet      *.parquet: a document a row
    webdataset   *.tar *.tgz: a document a sample
    text         text and code, by the list below: the file is the document

All but parquet may be compressed: .gz, .zst, .zstd after the name. A plain *.json may be a document, a list of them or
lines of them, a *.csv may be anything: whoever has such files says what they are.
"""

from __future__ import annotations

AUTO = "auto"
KINDS = ("jsonl", "parquet", "text", "webdataset")
RECORDS = ("jsonl", "parquet", "webdataset")
COMPRESSED = (".gz", ".zst", ".zstd")
_ENDINGS = """
    adb ads adoc agda asciidoc asm awk bash bat bib c cc cfg cjs cl clj cljs cls cmake cmd conf cpp cs css cu cuh
    cxx d dart diff ejs el elm erl ex exs f f03 f90 f95 fish for frag fs fsx glsl go gradle graphql groovy h haml hh
    hpp hrl hs htm html hxx ini inl java jinja jl js jsx kt kts lean less lhs lisp lua m m4 markdown md mdx mjs mk
    ml mli mm nim nix org pas patch php pl pm po pod proto ps1 py pyi pyx r rake rb rkt rmd rs rst s sass scala scm
    scss sh sql srt sty sv svelte swift tcl tex text textile thrift thy toml ts tsx txt v vala vb vert vhd vhdl vim
    vtt vue wiki xml yaml yml zig zsh
"""
TEXT_ENDINGS = frozenset(f".{ending}" for ending in _ENDINGS.split())
"""Of files that are one document each."""
TEXT_NAMES = frozenset(("makefile", "gnumakefile", "dockerfile", "containerfile", "rakefile", "gemfile", "jenkinsfile"))
CARDS = frozenset(("readme", "license", "licence", "copying", "notice", "changelog", "changes", "citation", "authors",
                   "contributing", "datasheet", "dataset_card", "terms_of_use"))
"""What lies beside records to describe them, without its ending."""
SUMS = frozenset(("sha256sums", "sha512sums", "sha1sums", "md5sums", "checksums", "_success", "dataset_infos.json",
                  "dataset_info.json", "dataset_dict.json"))
SUM_ENDINGS = (".sha256", ".sha512", ".sha1", ".md5", ".crc32", ".asc", ".sig")
FIRST_BYTES = (
    (b"\x1f\x8b", "gzip", "let its name end in .gz"), (b"\x28\xb5\x2f\xfd", "Zstandard", "let its name end in .zst"),
    (b"PAR1\x15", "parquet", "let its name end in .parquet"), (b"PK\x03\x04", "zip", "unpack it"),
    (b"BZh91AY&SY", "bzip2", "unpack it"), (b"\xfd7zXZ\x00", "xz", "unpack it"), (b"7z\xbc\xaf", "7-Zip", "unpack it"),
    (b"%PDF-1.", "PDF", "take its text out"), (b"\xff\xfe", "UTF-16", "convert it to UTF-8"),
    (b"\xfe\xff", "UTF-16", "convert it to UTF-8"), (b"\x7fELF", "ELF", "leave it out with --glob"),
    (b"\x89PNG", "PNG", "leave it out with --glob"), (b"Obj\x01", "Avro", "convert it to JSON lines"),
    (b"ARROW1\0", "Arrow", "convert it to parquet"))
TAR_AT, TAR = 257, b"ustar"
LOOKED_AT = 512
"""First bytes of a file that tell of an archive."""


def uncompressed_name(name: str) -> str:
    """The name in small letters, without the ending of a compression."""
    lower = name.lower()
    if lower.endswith(".tgz"):
        return lower.removesuffix(".tgz") + ".tar"
    return next((lower.removesuffix(ending) for ending in COMPRESSED if lower.endswith(ending)), lower)


def kind_of(name: str) -> str | None:
    """jsonl, parquet, webdataset or text by the name of a file; None: it does not say."""
    inner = uncompressed_name(name.rpartition("/")[2])
    packed = inner != name.rpartition("/")[2].lower()
    if inner.endswith((".jsonl", ".ndjson")) or (packed and inner.endswith(".json")):
        return "jsonl"
    if inner.endswith(".parquet") and not packed:
        return "parquet"
    if inner.endswith(".tar"):
        return "webdataset"
    stem, dot, ending = inner.rpartition(".")
    if inner in TEXT_NAMES or (stem and dot + ending in TEXT_ENDINGS):
        return "text"
    return None


def is_card(name: str) -> bool:
    """Whether a file describes the files beside it: README.md, LICENSE."""
    return uncompressed_name(name.rpartition("/")[2]).split(".")[0] in CARDS


def is_sum(name: str) -> bool:
    """Whether a file holds sums of the files beside it, or says that they are whole."""
    lower = name.rpartition("/")[2].lower()
    return lower in SUMS or lower.endswith(SUM_ENDINGS)


def why_no_text(content: bytes | bytearray) -> str:
    """What the first bytes of a file, or any of a whole one, say against its being text; empty: nothing."""
    for signature, what, remedy in FIRST_BYTES:
        if content.startswith(signature):
            return f"holds {what} data by its first bytes; {remedy}"
    if content[TAR_AT:TAR_AT + len(TAR)] == TAR:
        return "holds a tar by its first bytes; let its name end in .tar, or unpack it"
    return ""
