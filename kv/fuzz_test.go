package kv

import (
	"strings"
	"testing"

	"kedge/deployments/fuzzlimit"
)

// A key that is taken apart is one that kedge would write.
func FuzzParseKey(f *testing.F) {
	for _, key := range []string{"desired/prod/web/app", "pins/prod/web/app/web-1", "history/prod/web/app/17", "status/prod/web/../x", "control//"} {
		f.Add(key)
	}
	f.Fuzz(func(t *testing.T, key string) {
		fuzzlimit.Run(t, key, func() {
			k, err := ParseKey(key)
			if err == nil &&
				(k.Role.Check() != nil || strings.ContainsAny(key, "\x00\n\r\x1b ") || strings.Contains(key, "//")) {
				t.Errorf("%q is %+v", key, k)
			}
		})
	})
}
