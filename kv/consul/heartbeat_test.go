package consul

import (
	"errors"
	"fmt"
	"net/url"
	"testing"

	"github.com/hashicorp/consul/api"

	"kedge/kv"
)

// Consul's answer says whether a check is missing; an address that names one doesn't.
func TestMissesCheck(t *testing.T) {
	t.Parallel()
	for err, want := range map[error]bool{
		api.StatusError{Code: 500, Body: "Missing check 'service:kedge-agent' registration"}:                    true,
		api.StatusError{Code: 500, Body: "Check 'service:kedge-agent' is in critical state"}:                    true,
		api.StatusError{Code: 500, Body: "No cluster leader"}:                                                   false,
		&url.Error{Op: "Put", URL: "http://healthcheck:8500/v1/session/create", Err: errors.New("unreachable")}: false,
	} {
		wrapped := fmt.Errorf("create a session: %w: %w", kv.ErrUnavailable, err)
		if got := missesCheck(wrapped); got != want {
			t.Errorf("%v: %v, want %v", wrapped, got, want)
		}
	}
}
