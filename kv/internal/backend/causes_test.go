package backend_test

import (
	"errors"
	"testing"

	"kedge/kv/internal/backend"
)

func TestCausesAreNewOnce(t *testing.T) {
	var c backend.Causes
	for i, step := range []struct {
		err  string
		want bool
	}{
		{"dial 127.0.0.1:41234: refused", true},
		{"dial 127.0.0.1:41235: refused", false},
		{"x509: unknown authority", true},
		{"dial 127.0.0.1:41236: refused", false},
		{"", false}, // a success
		{"x509: unknown authority", true},
	} {
		var err error
		if step.err != "" {
			err = errors.New(step.err)
		}
		if got := c.FirstOfKind(err); got != step.want {
			t.Errorf("step %d, %q: %v, want %v", i, step.err, got, step.want)
		}
	}
}
