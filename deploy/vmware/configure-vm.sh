#!/bin/sh
# Prepares a virtual machine that is powered off, with govc: configure-vm.sh VM
# It keeps all but root of the guest from guestinfo, so that the agent's proof is as good as the agent's user,
# and hands user-data.yaml to the guest's cloud-init. GOVC_URL and the rest are govc's own.
set -eu
if [ $# -ne 1 ]; then
	echo "usage: $0 VM" >&2
	exit 2
fi
vm=$1
encode() { base64 | tr -d '\n'; }
metadata=$(printf 'instance-id: %s\nlocal-hostname: %s\n' "$(basename "$vm")" "$(basename "$vm")" | encode)
userdata=$(encode <"$(dirname "$0")/user-data.yaml")
govc vm.change -vm "$vm" \
	-e guest_rpc.rpci.auth.cmd.info-get=TRUE \
	-e guest_rpc.rpci.auth.cmd.info-set=TRUE \
	-e guestinfo.metadata="$metadata" -e guestinfo.metadata.encoding=base64 \
	-e guestinfo.userdata="$userdata" -e guestinfo.userdata.encoding=base64
