//go:build race

package kvtest

// RaceDetector reports whether the race detector is on. With it, reading 32 MiB of JSON takes longer than a request
// may.
const RaceDetector = true
