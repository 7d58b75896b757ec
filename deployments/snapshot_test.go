package deployments

import (
	"strings"
	"testing"
)

// A snapshot that no node would read isn't handed on with its error.
func TestSnapshotThatIsTooLarge(t *testing.T) {
	t.Parallel()
	s := Snapshot{URL: "s3://acme/snapshot",
		Records: map[string]string{"desired/prod/web/app": strings.Repeat("x", MaxSnapshot)}}
	data, err := s.Encode(func([]byte) ([]byte, error) { return []byte("signed"), nil })
	if data != nil || err == nil || !strings.Contains(err.Error(), "a snapshot of 1 records has") {
		t.Errorf("%d bytes, %v", len(data), err)
	}
}
