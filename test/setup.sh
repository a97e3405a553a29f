#!/usr/bin/env bash
# Installs what the test suite needs beyond Go. On Debian as root it installs; elsewhere it says
# what is missing and lets the tests decide (they skip loudly, or fail under REQUIRE_REAL=1).
set -euo pipefail
declare -A need=([gcc]=gcc [protoc]=protobuf-compiler [openssl]=openssl [jq]=jq [dockerd]=docker.io [containerd]=containerd
	[runc]=runc [iptables]=iptables [ipset]=ipset [docker]=docker.io [make]=make [git]=git [setpriv]=util-linux
	[systemd-nspawn]=systemd-container [dbus-daemon]=dbus [rpm]=rpm [swtpm]=swtpm [swtpm_setup]=swtpm-tools
	[docker-registry]=docker-registry [nginx]=nginx-light [pip3]=python3-pip [podman]=podman [newuidmap]=uidmap [softhsm2-util]=softhsm2
	[etcd]=etcd-server [ip]=iproute2 [cloud-init]=cloud-init [shellcheck]=shellcheck [curl]=curl [ssh-keygen]=openssh-client [wrk]=wrk)
# What keeps its identity in files.
need+=([initdb]=postgresql [psql]=postgresql-client [redis-server]=redis-server [redis-cli]=redis-tools)
# What judges alert rules.
need+=([promtool]=prometheus)
PATH=$PATH:/usr/sbin:/sbin:$(echo /usr/lib/postgresql/*/bin | tr ' ' :)
missing=()
for tool in "${!need[@]}"; do
	command -v "$tool" >/dev/null 2>&1 || missing+=("${need[$tool]}")
done
[ -x /usr/lib/cni/ptp ] || missing+=(containernetworking-plugins) # in no path
[ ${#missing[@]} -eq 0 ] && exit 0
mapfile -t missing < <(printf '%s\n' "${missing[@]}" | sort -u)
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
	echo "setup: installing ${missing[*]}"
	# cloud-init is for the machines of the lab: at this one's own boot it is to do nothing.
	command -v cloud-init >/dev/null 2>&1 || { mkdir -p /etc/cloud && touch /etc/cloud/cloud-init.disabled; }
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends libc6-dev "${missing[@]}" >/dev/null
else
	echo "setup: not installed and not root on Debian, so some tests will be skipped: ${missing[*]}" >&2
fi
