// Package server is the wiring of the server: Run opens the store and builds the parts from it up to
// the listeners, holds them in one group, and takes them down in the reverse order.
//
// What a part does is in its own folder; what is here is which part gets which, the listeners and
// their TLS, and the limits on connections.
package server
