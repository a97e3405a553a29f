#!/usr/bin/env bash
# Makes the test authority's certificates, real evidence as AWS would sign it, and forged evidence with one
# flaw each, with openssl. The keys stay nowhere: remaking makes all of it anew.
set -euo pipefail
cd "$(dirname "$0")"
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
rm -rf forged *.pem *.json; mkdir forged
authority() { openssl req -x509 -newkey rsa:2048 -nodes -keyout "$tmp/$1.key" -out "$2" -days 36500 -subj "/C=US/O=Test Web Services/CN=$1" 2>/dev/null; }
authority us-east-1 us-east-1.pem
authority eu-west-1 eu-west-1.pem
authority us-east-1-impostor "$tmp/impostor.pem"
document() { # account region instance [image]
	printf '{\n  "accountId" : "%s",\n  "architecture" : "x86_64",\n  "availabilityZone" : "%sa",\n  "billingProducts" : null,\n  "devpayProductCodes" : null,\n  "marketplaceProductCodes" : null,\n  "imageId" : "%s",\n  "instanceId" : "%s",\n  "instanceType" : "t3.micro",\n  "kernelId" : null,\n  "pendingTime" : "2026-11-01T10:00:00Z",\n  "privateIp" : "10.0.0.7",\n  "ramdiskId" : null,\n  "region" : "%s",\n  "version" : "2017-09-30"\n}' "$1" "$2" "${4:-ami-0123456789abcdef0}" "$3" "$2"
}
sign() { # key cert [options]: signs standard input as the metadata service gives it, base64 without a head
	local key=$1 cert=$2; shift 2
	openssl cms -sign -binary -nodetach -nocerts -md sha256 -signer "$cert" -inkey "$key" -outform DER "$@" | base64 -w 64
}
evidence() { # document rsa2048
	python3 -c 'import json, sys; print(json.dumps({"document": sys.argv[1], "signature": "", "rsa2048": sys.argv[2]}))' "$1" "$2"
}
us=(123456789012 us-east-1 i-0123456789abcdef0)
doc=$(document "${us[@]}")
own() { sign "$tmp/us-east-1.key" us-east-1.pem "$@"; }
evidence "$doc" "$(printf %s "$doc" | own)" > real.json
evidence "$doc" "$(printf %s "$doc" | own -stream -indef)" > real-indefinite-lengths.json
other=$(document 123456789012 us-east-1 i-0fedcba9876543210)
f() { cat > "forged/$1.json"; }
evidence "$other" "$(printf %s "$doc" | own)" | f another-document-beside-the-signed-one
evidence "$doc" "$(printf %s "$doc" | sign "$tmp/us-east-1-impostor.key" "$tmp/impostor.pem")" | f signed-by-another-key
evidence "$doc" "$(printf %s "$doc" | openssl cms -sign -binary -nodetach -md sha256 -signer "$tmp/impostor.pem" -inkey "$tmp/us-east-1-impostor.key" -certfile us-east-1.pem -outform DER | base64 -w 64)" | f signed-by-another-key-with-the-real-certificate-beside-it
evidence "$doc" "$(printf %s "$doc" | openssl cms -sign -binary -nodetach -nocerts -md sha256 -signer us-east-1.pem -inkey "$tmp/us-east-1.key" -signer "$tmp/impostor.pem" -inkey "$tmp/us-east-1-impostor.key" -outform DER | base64 -w 64)" | f two-signers
evidence "$doc" "$(printf %s "$doc" | openssl cms -sign -binary -nocerts -md sha256 -signer us-east-1.pem -inkey "$tmp/us-east-1.key" -outform DER | base64 -w 64)" | f content-is-not-in-the-message
evidence "$doc" "$(openssl crl2pkcs7 -nocrl -certfile us-east-1.pem -outform DER | base64 -w 64)" | f nobody-signed
evidence "$doc" "$(printf %s "$doc" | openssl cms -sign -binary -nodetach -nocerts -md sha1 -signer us-east-1.pem -inkey "$tmp/us-east-1.key" -outform DER | base64 -w 64)" | f signed-with-sha1
foreign=$(document 123456789012 eu-west-1 i-0123456789abcdef0)
evidence "$foreign" "$(printf %s "$foreign" | own)" | f another-regions-certificate
account=$(document 999999999999 us-east-1 i-0123456789abcdef0)
evidence "$account" "$(printf %s "$account" | own)" | f another-account
evidence "$other" "$(printf %s "$doc" | own | base64 -d | python3 -c 'import sys; sys.stdout.buffer.write(sys.stdin.buffer.read().replace(b"i-0123456789abcdef0", b"i-0fedcba9876543210"))' | base64 -w 64)" | f content-was-changed
path=$(document 123456789012 us-east-1 'i-0/../../x509pop/00')
evidence "$path" "$(printf %s "$path" | own)" | f instance-that-is-a-path
printf '{"instanceId":"i-0123456789abcdef0"}' > "$tmp/part"
evidence "" "$(own < "$tmp/part")" | f document-without-an-account
evidence "" "$(printf 'not JSON' | own)" | f signed-text-that-is-no-document
evidence "$doc" "" | f no-signature
evidence "$doc" "%%%" | f signature-that-is-no-base64
