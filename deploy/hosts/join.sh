#!/bin/sh
# Installs the agent and lets it join: join.sh PACKAGE TRUST_DOMAIN SERVER [more flags of "assay-agent setup"]
# PACKAGE is the deb or rpm. /etc/assay/bundle.pem must be there: "assay-server bundle show" prints it.
# Once the agent runs, calling it again changes nothing.
set -eu
if [ $# -lt 3 ]; then
	echo "usage: $0 PACKAGE TRUST_DOMAIN SERVER [flags of assay-agent setup]" >&2
	exit 2
fi
package=$1 trust_domain=$2 server=$3
shift 3
[ "$(id -u)" = 0 ] || { echo "$0: it installs a package, so it needs root" >&2; exit 1; }
[ -s /etc/assay/bundle.pem ] || { echo "$0: /etc/assay/bundle.pem is missing: \"assay-server bundle show\" prints what belongs into it" >&2; exit 1; }
if ! command -v assay-agent >/dev/null; then
	case $package in
	*.deb) DEBIAN_FRONTEND=noninteractive dpkg --install "$package" ;;
	*.rpm) rpm --install "$package" ;;
	*) echo "$0: $package is neither a deb nor an rpm" >&2; exit 2 ;;
	esac
fi
if [ ! -e /etc/assay/agent.hcl ]; then
	# What it cannot reach or show yet, the agent tries again by itself.
	assay-agent setup -noQuestions -trustDomain "$trust_domain" -serverAddress "$server" "$@" || [ -e /etc/assay/agent.hcl ]
fi
systemctl enable --now assay-agent.service
assay-agent healthcheck -wait 60s
