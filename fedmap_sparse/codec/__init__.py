"""The wire format: `docs/format.md` is its specification, this package one implementation."""

from fedmap_sparse.codec.container import Header, Section, parse_header
from fedmap_sparse.codec.decode import decode
from fedmap_sparse.codec.encode import DTYPES, Source, Stamp, check_dtype, compose, encode
from fedmap_sparse.codec.envelope import check_key, seal, unseal
from fedmap_sparse.codec.inspection import Inspection, SectionInfo, inspect, inspect_file
from fedmap_sparse.codec.message import MaskSection, Message
from fedmap_sparse.codec.state_dict import decode_state_dict, encode_state_dict
from fedmap_sparse.codec.values import Coding, Quantized, check_coding
from fedmap_sparse.errors import FormatError, NeedsMask

__all__ = [
    "DTYPES",
    "Coding",
    "FormatError",
    "Header",
    "Inspection",
    "MaskSection",
    "Message",
    "NeedsMask",
    "Quantized",
    "Section",
    "SectionInfo",
    "Source",
    "Stamp",
    "check_coding",
    "check_dtype",
    "check_key",
    "compose",
    "decode",
    "decode_state_dict",
    "encode",
    "encode_state_dict",
    "inspect",
    "inspect_file",
    "parse_header",
    "seal",
    "unseal",
]
