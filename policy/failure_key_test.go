package policy

import (
	"testing"

	"kedge/deployments"
)

// What the store lost of a claim never lets a release be tried again where it failed; a new commit or a retry does.
func TestSameRequest(t *testing.T) {
	t.Parallel()
	key := func(generation, claim, retry int64) string {
		return FailureKey(deployments.Record{Generation: generation, Claim: claim, Retry: retry})
	}
	for name, c := range map[string]struct {
		failed, asks string
		want         bool
	}{
		"the same":                         {key(5, 0, 0), key(7, 5, 0), true},
		"another commit":                   {key(5, 0, 0), key(7, 0, 0), false},
		"a retry":                          {key(5, 0, 0), key(6, 5, 1), false},
		"restored":                         {key(5, 0, 0), key(7, 4, 0), true},
		"restored, and a retry since":      {key(5, 0, 0), key(7, 4, 1), false},
		"lost":                             {key(5, 0, 0), key(10, -9, 0), true},
		"lost, after a retry":              {key(5, 0, 2), key(10, -9, 0), true},
		"lost, and a commit since":         {key(5, 0, 0), key(11, 0, 0), false},
		"lost, and a retry since":          {key(5, 0, 0), key(11, -9, 1), false},
		"failed while lost":                {key(10, -9, 0), key(10, -9, 0), true},
		"failed while lost, then a commit": {key(10, -9, 0), key(11, 0, 0), false},
		"failed while lost, then restored": {key(10, -9, 0), key(12, 5, 1), true},
		"lost twice":                       {key(10, -9, 0), key(15, -14, 0), true},
		"failed after what was lost":       {key(12, 0, 0), key(13, -9, 0), false},
		"a pin":                            {"pin s3://x", key(13, -9, 0), false},
		"no key is known":                  {"", key(13, -9, 0), false},
	} {
		if got := SameRequest(c.failed, c.asks); got != c.want {
			t.Errorf("%s: %q and %q: %v", name, c.failed, c.asks, got)
		}
	}
}
