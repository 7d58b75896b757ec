package transport

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"

	"github.com/go-git/go-git/v5/plumbing/transport"
	githttp "github.com/go-git/go-git/v5/plumbing/transport/http"
	gitssh "github.com/go-git/go-git/v5/plumbing/transport/ssh"
	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/knownhosts"

	"kedge/deployments/inputfile"
)

// Access has the credentials for a remote repository, and says whom to trust.
type Access struct {
	// SSHKey is the file of a private key; default: the SSH agent. KnownHosts is a known_hosts file; default:
	// ~/.ssh/known_hosts and /etc/ssh/ssh_known_hosts, as far as they exist.
	SSHKey, KnownHosts string
	// Env returns the value of an environment variable, one of those that git.Config.Env lists.
	Env func(string) string
}

// basicAuth returns the user name and token from the environment; nil: there is no token. It reads
// the token's file each time, so that the token can be replaced while the mirror runs.
func (a Access) basicAuth() (*githttp.BasicAuth, error) {
	token, err := Secret(a.Env, "KEDGE_GIT_TOKEN")
	if err != nil || token == "" {
		return nil, err
	}
	user := a.Env("KEDGE_GIT_USER")
	if user == "" {
		user = "kedge" // hosts that only check the token ignore the name, but need one
	}
	return &githttp.BasicAuth{Username: user, Password: token}, nil
}

// readTLS reads the files that GIT_SSL_CAINFO, GIT_SSL_CERT and GIT_SSL_KEY name, as in git(1).
func (a Access) readTLS() (files tlsFiles, err error) {
	for _, v := range []struct {
		name string
		into *string
	}{{"GIT_SSL_CAINFO", &files.authorities}, {"GIT_SSL_CERT", &files.certificate}, {"GIT_SSL_KEY", &files.key}} {
		file := a.Env(v.name)
		if file == "" {
			continue
		}
		data, err := inputfile.Read(v.name, file)
		if err != nil {
			return files, err
		}
		*v.into = string(data)
	}
	if files.certificate != "" && files.key == "" { // one file may contain both
		files.key = files.certificate
	}
	return files, nil
}

// Secret returns the value of the variable name, or else the trimmed content of the file that NAME_FILE names; empty:
// neither is set. An empty file is an error: it is more likely to be half written than to mean that there is no secret.
func Secret(env func(string) string, name string) (string, error) {
	if value := env(name); value != "" {
		return value, nil
	}
	file := env(name + "_FILE")
	if file == "" {
		return "", nil
	}
	data, err := inputfile.Read(name+"_FILE", file)
	if err != nil {
		return "", err
	}
	value := strings.TrimSpace(string(data))
	if value == "" {
		return "", fmt.Errorf("%s_FILE: %s is empty", name, file)
	}
	return value, nil
}

// sshAuth returns the authentication for e, and the files that it was read from. Without a key file
// the authentication has no keys: dial then takes those of the SSH agent.
func (a Access) sshAuth(e *transport.Endpoint) (gitssh.AuthMethod, []string, error) {
	files := []string{a.KnownHosts}
	if a.KnownHosts == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return nil, nil, fmt.Errorf("known hosts: %w: name a file with --known-hosts", err)
		}
		files = nil
		for _, file := range []string{filepath.Join(home, ".ssh", "known_hosts"), "/etc/ssh/ssh_known_hosts"} {
			if _, err := os.Stat(file); err == nil {
				files = append(files, file)
			}
		}
		if len(files) == 0 {
			return nil, nil, fmt.Errorf("known hosts: there is no ~/.ssh/known_hosts to check the key of %s against: name "+
				"a file with --known-hosts", e.Host)
		}
	}
	for _, file := range files {
		if err := inputfile.Check("--known-hosts", file); err != nil {
			return nil, nil, err
		}
	}
	known, err := gitssh.NewKnownHostsDb(files...)
	if err != nil {
		return nil, nil, fmt.Errorf("known hosts: %w", err)
	}
	port := e.Port
	if port == 0 {
		port = gitssh.DefaultPort
	}
	host := net.JoinHostPort(e.Host, fmt.Sprint(port))
	check := gitssh.HostKeyCallbackHelper{
		HostKeyCallback:   strict(known.HostKeyCallback(), files),
		HostKeyAlgorithms: known.HostKeyAlgorithms(host),
	}
	if a.SSHKey == "" {
		return &gitssh.PublicKeysCallback{User: e.User, HostKeyCallbackHelper: check}, files, nil
	}
	pem, err := inputfile.Read("--ssh-key", a.SSHKey)
	if err != nil {
		return nil, nil, err
	}
	key, err := ssh.ParsePrivateKey(pem)
	if errors.As(err, new(*ssh.PassphraseMissingError)) {
		return nil, nil, fmt.Errorf("ssh key %s has a passphrase, and nobody is here to type it: use a key of its own "+
			"for the mirror, or an SSH agent", a.SSHKey)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("ssh key %s: %w", a.SSHKey, err)
	}
	return &gitssh.PublicKeys{User: e.User, Signer: key, HostKeyCallbackHelper: check}, append(files, a.SSHKey), nil
}

// dialAgent connects to the SSH agent. The caller closes the connection.
func dialAgent(ctx context.Context) (conn net.Conn, err error) {
	err = errors.New("SSH_AUTH_SOCK is not set")
	if socket := os.Getenv("SSH_AUTH_SOCK"); socket != "" {
		conn, err = new(net.Dialer).DialContext(ctx, "unix", socket)
	}
	if err != nil {
		return nil, fmt.Errorf("ssh: no key file is named and no SSH agent answers: name a key file with --ssh-key (%w)", err)
	}
	return conn, nil
}

// hostKeyError means that a server's key is unknown, or differs from the one in known_hosts.
type hostKeyError struct{ text string }

func (e *hostKeyError) Error() string { return e.text }

// strict wraps check. If the host isn't in the known_hosts files, or is there with another key, the
// error names the host, the file and the key that the host has now.
func strict(check ssh.HostKeyCallback, files []string) ssh.HostKeyCallback {
	return func(host string, remote net.Addr, key ssh.PublicKey) error {
		err := check(host, remote, key)
		var mismatch *knownhosts.KeyError
		switch {
		case !errors.As(err, &mismatch):
			return err
		case len(mismatch.Want) == 0:
			return &hostKeyError{fmt.Sprintf("%s is not in %s: make sure that its key is %s, then add it "+
				"(ssh-keyscan prints it)",
				host, strings.Join(files, " or "), ssh.FingerprintSHA256(key))}
		default:
			return &hostKeyError{fmt.Sprintf("the key of %s is not the one in %s:%d, but %s: somebody may be listening in; "+
				"replace that line only if the server has a new key",
				host, mismatch.Want[0].Filename, mismatch.Want[0].Line, ssh.FingerprintSHA256(key))}
		}
	}
}

// tlsFiles has the contents of the files that readTLS reads, in PEM. The authorities come on top of the system's.
type tlsFiles struct{ authorities, certificate, key string }

func (f tlsFiles) config() (*tls.Config, error) {
	config := &tls.Config{}
	if f.authorities != "" {
		pool, err := x509.SystemCertPool()
		if err != nil {
			pool = x509.NewCertPool()
		}
		if !pool.AppendCertsFromPEM([]byte(f.authorities)) {
			return nil, errors.New("GIT_SSL_CAINFO: the file has no certificate in PEM")
		}
		config.RootCAs = pool
	}
	if f.certificate != "" {
		pair, err := tls.X509KeyPair([]byte(f.certificate), []byte(f.key))
		if err != nil {
			return nil, fmt.Errorf("GIT_SSL_CERT and GIT_SSL_KEY: %w", err)
		}
		config.Certificates = []tls.Certificate{pair}
	}
	return config, nil
}
