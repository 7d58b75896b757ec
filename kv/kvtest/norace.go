//go:build !race

package kvtest

// RaceDetector reports whether the race detector is on.
const RaceDetector = false
