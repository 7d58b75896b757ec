package object

import (
	"net/http"
	"testing"
	"time"
)

// However long a server wants to be left alone, the wait has a bound, and is never negative.
func TestRetryAfterIsBounded(t *testing.T) {
	t.Parallel()
	for header, want := range map[string]time.Duration{
		"": 0, "soon": 0, "-1": 0, "0": 0, "7": 7 * time.Second, "31": maxRetryAfter, "10000000000": maxRetryAfter,
		"9223372036854775807": maxRetryAfter,
	} {
		if got := retryAfter(http.Header{"Retry-After": {header}}); got != want {
			t.Errorf("%q: %v, want %v", header, got, want)
		}
	}
}
