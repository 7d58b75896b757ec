package transport

import (
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/go-git/go-git/v5/plumbing/transport"
)

// A pipe or a device in place of a file of the configuration holds up nothing, and the error names the setting.
func TestSettingsThatNameNoFile(t *testing.T) {
	t.Parallel()
	pipe := filepath.Join(t.TempDir(), "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	endpoint := &transport.Endpoint{Protocol: "ssh", User: "git", Host: "127.0.0.1"}
	for setting, read := range map[string]func(Access, string) error{
		"KEDGE_GIT_TOKEN_FILE": func(a Access, _ string) error { _, err := a.basicAuth(); return err },
		"GIT_SSL_CAINFO":       func(a Access, _ string) error { _, err := a.readTLS(); return err },
		"GIT_SSL_CERT":         func(a Access, _ string) error { _, err := a.readTLS(); return err },
		"GIT_SSL_KEY":          func(a Access, _ string) error { _, err := a.readTLS(); return err },
		"KEDGE_GITHUB_APP_KEY_FILE": func(_ Access, f string) error {
			_, err := (&githubApp{keyFile: f}).jwt(time.Now())
			return err
		},
		"--known-hosts": func(a Access, f string) error {
			a.KnownHosts = f
			_, _, err := a.sshAuth(endpoint)
			return err
		},
		"--ssh-key": func(a Access, f string) error {
			a.SSHKey = f
			_, _, err := a.sshAuth(endpoint)
			return err
		},
	} {
		for _, file := range []string{pipe, "/dev/zero"} {
			a := Access{KnownHosts: "/dev/null", Env: func(name string) string {
				if name == setting {
					return file
				}
				return ""
			}}
			err := read(a, file)
			if err == nil || !strings.Contains(err.Error(), setting) || !strings.Contains(err.Error(), file+" is a") {
				t.Errorf("%s: %v", setting, err)
			}
		}
	}
}
