package fuzzlimit

// Guard is guard, for tests.
var Guard = guard
