// Package agent wires an agent together: join admits it to the server, uplink follows the server's
// picture, issue turns entries into SVIDs, keep holds what must survive a restart, and workloadapi
// hands the SVIDs to the processes beside it.
package agent
