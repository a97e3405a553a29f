#!/bin/sh
# Prepares a machine for being made an image or a template of: nothing of what it is may live on in its copies.
# Run it last, as root, and power the machine off; started again without being copied, it attests anew.
set -eu
[ "$(id -u)" = 0 ] || { echo "$0: it needs root" >&2; exit 1; }
systemctl disable --now assay-agent.service assay-agent.socket 2>/dev/null || true
# The agent's identity and keys, its configuration, and a token that may be left.
rm -rf /var/lib/assay/agent
rm -f /etc/assay/agent.hcl /etc/assay/agent.hcl.old /etc/assay/join-token
# The machine's own certificate and device identity, where "assay-agent setup" looks for them.
rm -f /etc/assay/node.key /etc/assay/node.pem /etc/assay/devid.pem /etc/assay/devid.priv /etc/assay/devid.pub
# Each copy makes its own, and with it is told apart from the others.
: >/etc/machine-id
rm -f /var/lib/dbus/machine-id
# cloud-init runs in a copy as it did in the first machine.
if command -v cloud-init >/dev/null; then cloud-init clean --logs --seed; fi
rm -f /etc/ssh/ssh_host_*
echo "ready: power it off and make the image"
