package deployments

import (
	"strings"
	"testing"
)

// People are shown a release by its version and the beginning of its digest, whatever its URL holds.
func TestPointerShort(t *testing.T) {
	digest := strings.Repeat("9f2c01ab", 8)
	for url, want := range map[string]string{
		"s3://releases/app/1.4.2/manifest.yaml":            "1.4.2 9f2c01ab",
		"https://example.com/app-1.4.2.yml":                "app-1.4.2 9f2c01ab",
		"https://example.com/1.4.2/manifest.yml?X-Sign=ab": "1.4.2 9f2c01ab",
	} {
		p, err := ParsePointer(url + "@sha256:" + digest)
		if err != nil {
			t.Fatal(err)
		}
		if got := p.Short(); got != want {
			t.Errorf("%s: %q, want %q", url, got, want)
		}
	}
	hostile := Pointer{URL: "s3://releases/app/1\x1b[31m\u202e\n2/manifest.yaml"}
	if got := hostile.Version(); strings.ContainsAny(got, "\x1b\u202e\n") {
		t.Errorf("a version with control characters: %q", got)
	}
	if got := (Pointer{}).Short(); got != "-" {
		t.Errorf("no release: %q", got)
	}
}
