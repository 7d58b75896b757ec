//go:build !race

package kvtest

// RaceDetector is set in tests that run with it.
const RaceDetector = false
