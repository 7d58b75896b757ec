package transport

import (
	"strings"
	"testing"
)

// The address of a repository is shown in logs and in the store, so it must not have credentials in it.
func TestOpenRefusesCredentialsInTheAddress(t *testing.T) {
	access := Access{Env: func(string) string { return "" }}
	for address, want := range map[string]string{
		"https://mirror:s3cret@git.example.com/a.git": "KEDGE_GIT_TOKEN",
		"http://mirror:s3cret@localhost:3000/a.git":   "KEDGE_GIT_TOKEN",
		"ssh://git:s3cret@git.example.com/a.git":      "use a key",
		"git:s3cret@git.example.com:a.git":            "use a key",
		"https://mirror:s3cret/x@git.example.com/a":   "repository",
		"https://mirror:s3cret?x@git.example.com/a":   "repository",
		"https://mirror:s3cret#x@git.example.com/a":   "repository",
		"https://mirror:s3cret x@git.example.com/a":   "repository",
		"https:/mirror:s3cret@git.example.com/a":      "want https://HOST/PATH",
		"https//mirror:s3cret@git.example.com/a":      "want https://HOST/PATH",
		"https://git.example.com/a?private=s3cret":    "without a query",
		"git:s3cret@git.example.com:22/a.git":         "use a key",
	} {
		_, err := Open(address, access)
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%s: %v, want %q without the password", address, err, want)
		}
	}
	for _, address := range []string{"https://git.example.com/a.git", "http://localhost:3000/a.git",
		"git@git.example.com:a.git"} {
		if _, err := Open(address, access); err != nil {
			t.Errorf("%s: %v", address, err)
		}
	}
}
