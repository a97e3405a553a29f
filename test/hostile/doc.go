// Package hostile attacks a whole server and a whole agent through every socket they open, and looks
// at three things: that each answer is a deliberate code, that an honest caller is served before,
// during and after, and that memory, descriptors and goroutines come back to where they were.
//
// The tables of bad values are made from the descriptors of the messages, and the methods are found
// by knocking at each socket: a new field is spoiled without anybody thinking of it, and a new method
// without a sample fails the test until it has one (samples_test.go).
//
// What is asserted is counts and bounds, never times. The attacks below gRPC run against a process of
// its own (the test binary, started again as the victim), so that what is measured is its alone.
package hostile
