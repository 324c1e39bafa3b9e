"""The wire format: `docs/format.md` is its specification, this package one implementation."""

from fedmap_sparse.codec.container import Header, Section, parse_header
from fedmap_sparse.codec.inspection import Inspection, SectionInfo, inspect
from fedmap_sparse.codec.message import (
    DTYPES,
    Body,
    Message,
    check_dtype,
    decode,
    encode,
    encode_body,
    encode_flat,
    pack_parts,
    wire_parts,
)
from fedmap_sparse.codec.state_dict import decode_state_dict, encode_state_dict
from fedmap_sparse.codec.values import Quantized
from fedmap_sparse.errors import FormatError, NeedsMask

__all__ = [
    "DTYPES",
    "Body",
    "FormatError",
    "Header",
    "Inspection",
    "Message",
    "NeedsMask",
    "Quantized",
    "Section",
    "SectionInfo",
    "check_dtype",
    "decode",
    "decode_state_dict",
    "encode",
    "encode_body",
    "encode_flat",
    "encode_state_dict",
    "inspect",
    "pack_parts",
    "parse_header",
    "wire_parts",
]
