"""A workload in Python with the spiffe package. It prints a line of JSON for each X509-SVID it is given and
for each command on standard input: "jwt AUDIENCE", or "call HOST:PORT SPIFFE-ID", which is mTLS."""
import json
import os
import socket
import ssl
import sys
import tempfile
import threading

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from spiffe import JwtSource, X509Source

lock = threading.Lock()


def say(**what):
    with lock:
        print(json.dumps(what), flush=True)


source = X509Source()
tokens = JwtSource()


def shown():
    svid = source.svid
    say(x509=str(svid.spiffe_id), serial=str(svid.leaf.serial_number))


def call(address, want):
    svid = source.svid
    bundle = source.get_bundle_for_trust_domain(svid.spiffe_id.trust_domain)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # the peer is known by its SPIFFE ID
    context.load_verify_locations(cadata="".join(a.public_bytes(Encoding.PEM).decode() for a in bundle.x509_authorities))
    with tempfile.NamedTemporaryFile() as pair:  # ssl takes keys from files only
        for cert in svid.cert_chain:
            pair.write(cert.public_bytes(Encoding.PEM))
        pair.write(svid.private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        pair.flush()
        context.load_cert_chain(pair.name)
    host, port = address.rsplit(":", 1)
    with socket.create_connection((host, int(port))) as plain, context.wrap_socket(plain) as conn:
        peer = x509.load_der_x509_certificate(conn.getpeercert(binary_form=True))
        ids = peer.extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(x509.UniformResourceIdentifier)
        if ids != [want]:
            raise ValueError(f"the peer is {ids}")
        return conn.makefile().readline().strip()


source.subscribe_for_updates(shown)
shown()
for line in sys.stdin:
    command, *args = line.split()
    try:
        if command == "jwt":
            say(jwt=tokens.fetch_svid(audience={args[0]}).token)
        else:
            say(heard=call(*args))
    except Exception as e:  # the test reads it
        say(error=f"{type(e).__name__}: {e}")
os._exit(0)
