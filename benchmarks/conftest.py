import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--size", type=int, default=1 << 18, help="elements a case (the tables use 26214400)"
    )
