from hypothesis import given
from hypothesis import strategies as st
from starlette.routing import compile_path

from gateway.routing import RouteIndex

SEGMENT = st.sampled_from(["a", "b", "files", "{x}", "{y}"])
PATTERN = st.builds(
    lambda segments, rest: "/" + "/".join(segments + rest),
    st.lists(SEGMENT, max_size=4, unique=True),
    st.sampled_from([[], ["{rest:path}"]]),
)
PATH = st.lists(st.sampled_from(["a", "b", "files", "c"]), min_size=1, max_size=5).map(
    lambda parts: "/" + "/".join(parts)
)


def first_match(patterns: list[str], path: str) -> str | None:
    return next((pattern for pattern in patterns if compile_path(pattern)[0].match(path)), None)


@given(patterns=st.lists(PATTERN, max_size=12, unique=True), path=PATH)
def test_first_candidate_that_matches_is_the_first_route_that_matches(patterns, path):
    candidates = RouteIndex((pattern, pattern) for pattern in patterns).candidates(path)
    assert first_match(candidates, path) == first_match(patterns, path)


def test_only_what_fits_is_tried():
    patterns = ["/a", "/a/{x}", "/a/{x}/b", "/a/{x}/c", "/a/{x}/files/{rest:path}", "/d"]
    index = RouteIndex((pattern, pattern) for pattern in patterns)
    assert index.candidates("/a/1/b") == ["/a/{x}/b"]
    assert index.candidates("/a/1/files/x/y") == ["/a/{x}/files/{rest:path}"]
    assert index.candidates("/nothing") == []
