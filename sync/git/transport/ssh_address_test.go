package transport

import "testing"

// The port of a URL wins over that of ssh_config, as with ssh itself.
func TestSSHAddress(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name           string
		port           int    // of the URL; 0: none
		hostname, conf string // in ssh_config
		want           string
	}{
		{"nothing is configured", 0, "", "", "git.example.org:22"},
		{"the URL's port alone", 2222, "", "", "git.example.org:2222"},
		{"another name", 0, "10.0.0.7", "", "10.0.0.7:22"},
		{"another name and port", 0, "10.0.0.7", "2200", "10.0.0.7:2200"},
		{"another name and port, as go-git parses HOST:PATH", 22, "10.0.0.7", "2200", "10.0.0.7:2200"},
		{"another name, and a port in both", 2222, "10.0.0.7", "2200", "10.0.0.7:2222"},
		{"another name, and ssh's default", 2222, "10.0.0.7", "22", "10.0.0.7:2222"},
	} {
		get := func(host, key string) string {
			if host != "git.example.org" {
				t.Errorf("%s: asked of %s", c.name, host)
			}
			return map[string]string{"Hostname": c.hostname, "Port": c.conf}[key]
		}
		if got := sshAddress("git.example.org", c.port, get); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
}
