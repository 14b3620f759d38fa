"""Targets: what is given for one, what is refused and in which words."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from replicas import TlsFiles

from harness.client.target import Target, Tls, address_of, options_in_environment, parse_headers
from harness.content import content_of
from harness.errors import InputError

SECRET = "Bearer s3cret"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return TlsFiles(tmp_path_factory.mktemp("tls"))


@pytest.mark.parametrize(
    "url, address, scheme",
    [
        ("grpc://gpu7:9001", "gpu7:9001", "grpc"),
        ("GRPCS://gpu7/", "gpu7:8001", "grpcs"),
        ("127.0.0.1:8001", "127.0.0.1:8001", ""),
        (" gpu7 ", "gpu7:8001", ""),
        ("[::1]", "[::1]:8001", ""),
        ("[::1]:9001", "[::1]:9001", ""),
    ],
)
def test_addresses(url, address, scheme):
    assert address_of(url) == (address, scheme)


@pytest.mark.parametrize(
    "url, words",
    [
        ("", "not a server address"),
        ("http://gpu7:8000", "grpc://host:8001"),
        ("https://gpu7:443", "grpcs://host:"),
        ("gpu7:port", "no usable port"),
        ("gpu7:0", "no usable port"),
        ("gpu7:99999", "no usable port"),
        (":8001", "no usable port"),
        ("gpu7/v2", "not a server address"),
        ("::1", r"\[::1\]:8001"),
        ("gpu7:8001,", "not a server address"),
        ("gpu7,gpu7:8001", "given twice"),
        ("grpc://a,grpcs://b", "plain text"),
    ],
)
def test_what_is_no_address(url, words):
    with pytest.raises(InputError, match=words):
        Target.of(url)


def test_a_target_has_a_server():
    with pytest.raises(InputError, match="no server is given"):
        Target.of([])


def test_a_password_in_a_url_is_refused_and_not_repeated():
    with pytest.raises(InputError, match="--header @FILE") as error:
        Target.of("grpc://me:s3cret@gpu7:8001")
    assert "s3cret" not in str(error.value)


def test_several_urls_are_one_target():
    for given_as in ("grpcs://a:1,b:2,grpcs://c", ["grpcs://a:1", "b:2,c:8001"]):
        target = Target.of(given_as)
        assert (target.addresses, target.tls) == (("a:1", "b:2", "c:8001"), Tls())
        assert Target.of(target.url) == target == Target.of(target)
    assert Target.of("a:1,b").url == "a:1,b:8001"


@pytest.mark.parametrize(
    "options, words",
    [
        ({"tls_client_cert": "{}/client.pem"}, "--tls-client-cert needs --tls-client-key too"),
        ({"tls_client_key": "{}/client.key"}, "--tls-client-key needs --tls-client-cert too"),
        ({"tls_ca": "{}/none.pem"}, "--tls-ca .*none.pem cannot be read: No such file"),
        ({"tls_ca": "{}"}, "cannot be read: Is a directory"),
        ({"tls_ca": "{}/client.key"}, "holds no certificate in PEM"),
        ({"tls_ca": "{}/der"}, "--tls-ca .*der holds no certificate in PEM"),
        (
            {"tls_client_cert": "{}/der", "tls_client_key": "{}/client.key"},
            "--tls-client-cert .*der holds no certificate in PEM",
        ),
        (
            {"tls_client_cert": "{}/client.pem", "tls_client_key": "{}/der"},
            "--tls-client-key .*der holds no key in PEM",
        ),
        (
            {"tls_client_cert": "{}/client.pem", "tls_client_key": "{}/stranger.key"},
            "is not the key of --tls-client-cert",
        ),
        ({"tls_client_cert": "{}/client.pem", "tls_client_key": "{}/locked.key"}, "is encrypted"),
        ({"tls_client_cert": "{}/client.pem", "tls_client_key": "{}/torn.key"}, "cannot be used"),
        ({"balance": "least_loaded"}, "did you mean 'least-loaded'"),
        ({"balance": "x"}, "not one of round-robin, least-loaded$"),
        ({"request_timeout": "30s"}, "--request-timeout '30s' is not a number of seconds"),
        ({"silence_timeout": "0"}, "--silence-timeout 0 must be above 0"),
        ({"ready_timeout": "inf"}, "--ready-timeout inf must be above 0"),
        ({"request_timeout": "nan"}, "--request-timeout nan must be above 0"),
        ({"header": ["x-team speech"]}, "--header number 1 has no colon"),
        ({"header": ["a: b", "grpc-timeout: 1S"]}, "number 2: grpc-timeout is set by gRPC itself"),
        ({"header": ["Host: x"]}, "host is set by gRPC itself"),
        ({"header": ["x y: z"]}, "the name 'x y' must consist of ASCII"),
        ({"header": ["näme: z"]}, "must consist of ASCII"),
        ({"header": ["token-bin: z"]}, "is a binary header"),
        ({"header": ["authorization: "]}, "authorization has no value"),
        ({"header": ["x: café"]}, "not printable ASCII"),
        ({"header": ["@{}/none"]}, "--header .*none cannot be read"),
        ({"header": ["@{}/headers"]}, "line 3 of --header @.*headers has no colon"),
        ({"header": ["@{}/latin"]}, "not ASCII"),
        ({"header": ["@\0"]}, "cannot be read: embedded null byte"),
        ({"header": ["@"]}, "--header @ names no file: write --header @FILE"),
    ],
)
def test_what_cannot_be_used_is_said_at_once(files, options, words):
    from cryptography.hazmat.primitives import serialization as pem

    key = open(files.key, "rb").read()
    locked = pem.BestAvailableEncryption(b"word")
    locked = pem.load_pem_private_key(key, None).private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, locked)
    for name, content in (("der", b"\x30\x82\x01\x0a"), ("locked.key", locked), ("torn.key", key[:90])):
        files.write(name, content)
    files.write("headers", b"x-team: speech\n\nno colon here\n")
    files.write("latin", b"x: caf\xe9\n")
    filled = {
        name: [each.format(files.folder) for each in value] if isinstance(value, list) else value.format(files.folder)
        for name, value in options.items()
    }
    with pytest.raises(InputError, match=words):
        Target.from_options("gpu7", filled)


def test_plain_text_and_tls_options_contradict_each_other(files):
    with pytest.raises(InputError, match="the --tls options need TLS"):
        Target.from_options("grpc://gpu7", {"tls_ca": files.ca})


def test_headers_are_folded_and_read_from_files(files):
    path = files.write("fine", f"Authorization: {SECRET}\n\nx-team:speech:eu\n".encode())
    assert parse_headers([f"@{path}", "X-Run: 7"]) == (
        ("authorization", SECRET),
        ("x-team", "speech:eu"),
        ("x-run", "7"),
    )


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=30).filter(lambda text: not text.startswith("@")))
def test_no_header_is_refused_with_what_may_be_its_secret(text):
    try:
        ((name, value),) = parse_headers([f"{text}s3cret"])
    except InputError as error:
        assert "s3cret" not in str(error)
    else:
        assert value.endswith("s3cret") and name == name.lower() and value.isascii()


def test_the_environment_gives_the_same_options(files, monkeypatch):
    monkeypatch.setenv("LOCUST_TLS_CA", files.ca)
    monkeypatch.setenv("LOCUST_HEADER", json.dumps([f"authorization: {SECRET}", "x-team: speech"]))
    monkeypatch.setenv("LOCUST_REQUEST_TIMEOUT", "2.5")
    target = Target.from_environment("gpu7")
    assert (target.tls, target.request_s) == (Tls(ca=files.ca), 2.5)
    assert target.headers == (("authorization", SECRET), ("x-team", "speech"))
    assert options_in_environment({"LOCUST_HEADER": "x-team: speech", "LOCUST_BALANCE": ""}) == {
        "header": ["x-team: speech"]
    }
    with pytest.raises(InputError, match="LOCUST_HEADER is not a JSON list"):
        options_in_environment({"LOCUST_HEADER": "[a: b]"})


def test_a_secret_is_in_no_record_and_no_repr_but_travels_to_a_reader(files):
    target = Target.of("a,b", Tls(files.ca, files.cert, files.key), headers=(("authorization", SECRET), ("x", "y")))
    record = json.dumps(content_of(target.record()))
    assert "s3cret" not in record + repr(target) and "authorization" in record and "PRIVATE KEY" not in record
    assert target.record().addresses == ("a:8001", "b:8001")
    assert Target.from_plain(json.loads(json.dumps(target.to_plain()))) == target
