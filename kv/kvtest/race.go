//go:build race

package kvtest

// RaceDetector is set where reading 32 MiB of JSON takes longer than a request may.
const RaceDetector = true
