#!/bin/sh
# Launches an instance whose agent joins by itself: launch.sh IMAGE INSTANCE_PROFILE [more flags of run-instances]
# The instance profile's role is one of the server's instance_roles; it needs no permissions, and its trust
# policy is instance-trust-policy.json.
set -eu
if [ $# -lt 2 ]; then
	echo "usage: $0 IMAGE INSTANCE_PROFILE [flags of aws ec2 run-instances]" >&2
	exit 2
fi
image=$1 profile=$2
shift 2
# The metadata service in version 2 only, and not from within containers: one hop.
exec aws ec2 run-instances --image-id "$image" --iam-instance-profile "Name=$profile" \
	--metadata-options "HttpTokens=required,HttpPutResponseHopLimit=1,HttpEndpoint=enabled" \
	--user-data "file://$(dirname "$0")/user-data.yaml" "$@"
