#!/usr/bin/env bash
# Remakes everything in this folder with openssl: certificates as machines have them (real-*), and
# evidence with one flaw each (forged/*.json; the name is the flaw). All of it is valid for a century,
# but for what is forged by its dates.
set -euo pipefail
cd "$(dirname "$0")"
out=$PWD
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
rm -rf real-* forged
mkdir forged
cd "$tmp"
days=36500

key() { # name, kind
	case $2 in
	ec) openssl ecparam -name prime256v1 -genkey -noout -out "$1.key" ;;
	ed25519) openssl genpkey -algorithm ed25519 -out "$1.key" ;;
	*) openssl genrsa -out "$1.key" "$2" ;;
	esac 2>/dev/null
}
root() { # name
	key "$1" ec
	openssl req -x509 -new -key "$1.key" -subj "/O=Machines/CN=$1" -days $days -out "$1.pem" \
		-addext basicConstraints=critical,CA:true -addext keyUsage=critical,keyCertSign 2>/dev/null
}
sign() { # name, issuer, subject, extensions, more x509 arguments
	local name=$1 issuer=$2 subject=$3 extensions=$4
	shift 4
	openssl req -new -key "$name.key" -subj "$subject" -out "$name.csr" 2>/dev/null
	openssl x509 -req -in "$name.csr" -CA "$issuer.pem" -CAkey "$issuer.key" -extfile <(printf '%b' "$extensions") \
		-days $days -out "$name.pem" "$@" 2>/dev/null
}
evidence() { # flaw, certificates
	local flaw=$1 list=
	shift
	for name in "$@"; do
		list+="${list:+,}\"$(openssl x509 -in "$name.pem" -outform DER | base64 -w0)\""
	done
	printf '{"certificates":[%s]}\n' "$list" >"$out/forged/$flaw.json"
}
leaf='basicConstraints=critical,CA:false\nkeyUsage=critical,digitalSignature\n'
ca='basicConstraints=critical,CA:true\nkeyUsage=critical,keyCertSign\n'

root root
root other-root
key intermediate 2048
sign intermediate root /O=Machines/CN=intermediate "$ca" -set_serial 2
names='subjectAltName=DNS:web1.example.org,URI:x509pop://example.org/datacenter/us-east-1,URI:x509pop://example.org/rack/7/left,URI:x509pop://example.com/rack/9,URI:x509pop://example.org/lonely\n'
key ecdsa ec
sign ecdsa intermediate /O=Machines/CN=web1 "$leaf$names" -set_serial 0xa1b2c3
key rsa 2048
sign rsa intermediate /O=Machines/CN=web2 "$leaf" -set_serial 0x0a1b2c3d4e5f
cp root.pem "$out/real-root.pem"
cp intermediate.pem "$out/real-intermediate.pem"
for name in ecdsa rsa; do
	cp $name.pem "$out/real-$name.pem"
	cp $name.key "$out/real-$name.key"
done

cp ecdsa.key victim.key
sign victim other-root /O=Machines/CN=web1 "$leaf$names" -set_serial 0xa1b2c3
evidence signed-by-another-root victim
evidence intermediate-missing ecdsa
evidence leaf-last intermediate ecdsa
key x ec
sign x intermediate /CN=x 'basicConstraints=critical,CA:false\nkeyUsage=critical,keyEncipherment\n'
evidence no-digital-signature x intermediate
sign x intermediate /CN=x 'basicConstraints=critical,CA:false\n'
evidence no-key-usage x intermediate
sign x intermediate /CN=x 'basicConstraints=critical,CA:true\nkeyUsage=critical,digitalSignature,keyCertSign\n'
evidence leaf-is-an-authority x intermediate
sign x ecdsa /CN=x "$leaf"
evidence signed-by-a-leaf x ecdsa intermediate
# openssl before 3.4 takes dates only in its ca command, and that only from files.
touch index.txt; echo 1000 >serial
printf '[ca]\ndefault_ca=d\n[d]\ndatabase=index.txt\nnew_certs_dir=.\nserial=serial\ndefault_md=sha256\npolicy=p\n[p]\ncommonName=supplied\n' >ca.cnf
printf '%b' "$leaf" >leaf.ext
openssl ca -batch -config ca.cnf -cert intermediate.pem -keyfile intermediate.key -in x.csr -out x.pem -notext \
	-startdate 20200101000000Z -enddate 20200102000000Z -extfile leaf.ext 2>/dev/null
evidence expired x intermediate
key weak 1024
sign weak intermediate /CN=weak "$leaf"
evidence rsa-1024 weak intermediate
key edwards ed25519
sign edwards intermediate /CN=edwards "$leaf"
evidence ed25519-key edwards intermediate
evidence five-intermediates ecdsa intermediate intermediate intermediate intermediate intermediate
openssl x509 -in ecdsa.pem -outform DER >ecdsa.der
printf '{"certificates":["%s"]}\n' "$(head -c 200 ecdsa.der | base64 -w0)" >"$out/forged/half-a-certificate.json"
{ cat ecdsa.der; printf x; } >long.der
printf '{"certificates":["%s"]}\n' "$(base64 -w0 long.der)" >"$out/forged/byte-after-the-certificate.json"
# The signature is the last thing in the DER: its last byte.
{ head -c -1 ecdsa.der; printf '\x00'; } >bent.der
printf '{"certificates":["%s","%s"]}\n' "$(base64 -w0 bent.der)" \
	"$(openssl x509 -in intermediate.pem -outform DER | base64 -w0)" >"$out/forged/bent-signature.json"
printf '{"certificates":[]}\n' >"$out/forged/no-certificate.json"
printf '{"certificates":[""]}\n' >"$out/forged/empty-certificate.json"
printf '{"certificates":"MIIB"}\n' >"$out/forged/certificates-not-a-list.json"
printf '{"certificates":["%%%%"]}\n' >"$out/forged/not-base64.json"
chmod 0644 "$out"/real-*
