// Package labhosts is a data center on one machine: a server, agents on hosts of their own and a router
// between them. One host is a machine with a real systemd that runs the package, one has a TPM and runs
// Podman, one is a virtual machine of vSphere, one an instance of EC2, one has nothing but a token. Their
// links are cut, their clocks set and they are rebooted, with the server and without.
//
// LAB_REPORT names a file for the times, which are never judged; make lab-hosts prints them.
package labhosts
