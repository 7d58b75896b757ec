package secret

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"kedge/deployments/inputfile"
	"kedge/deployments/wait"
)

const (
	maxVaultAnswer = 1 << 20
	// vaultTries bounds how often a path is requested while Vault is away, is sealed, has no leader
	// or limits the rate of requests.
	vaultTries = 3
	vaultPause = 200 * time.Millisecond
)

// readVault reads a path of Vault's API, in up to vaultTries tries, and returns its JSON answer.
func readVault(ctx context.Context, path string) (string, error) {
	address := os.Getenv("VAULT_ADDR")
	base, err := url.Parse(address)
	if err != nil || base.Host == "" || base.Scheme != "https" && base.Scheme != "http" || base.User != nil ||
		base.RawQuery != "" || base.Fragment != "" {
		return "", errors.New("VAULT_ADDR: want Vault's address, as in https://vault.example:8200")
	}
	client, err := vaultClient()
	if err != nil {
		return "", err
	}
	defer client.CloseIdleConnections()
	for try := 1; ; try++ {
		answer, again, err := askVault(ctx, client, base.JoinPath("v1", path))
		if err == nil || !again || try == vaultTries {
			return answer, err
		}
		if wait.For(ctx, vaultPause) != nil {
			return "", err
		}
	}
}

// askVault makes one request; again reports whether another try may succeed.
func askVault(ctx context.Context, client *http.Client, u *url.URL) (answer string, again bool, _ error) {
	token, err := vaultToken()
	if err != nil {
		return "", false, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return "", false, err
	}
	req.Header.Set("X-Vault-Token", token)
	req.Header.Set("X-Vault-Request", "true")
	if namespace := os.Getenv("VAULT_NAMESPACE"); namespace != "" {
		req.Header.Set("X-Vault-Namespace", namespace)
	}
	resp, err := client.Do(req)
	if err != nil {
		return "", true, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxVaultAnswer+1))
	switch code := resp.StatusCode; {
	case err != nil:
		return "", true, fmt.Errorf("reading Vault's answer: %w", err)
	case code == http.StatusOK && len(body) > maxVaultAnswer:
		return "", false, fmt.Errorf("the answer of Vault has more than %d bytes", maxVaultAnswer)
	case code == http.StatusOK:
		return string(body), false, nil
	case code == http.StatusForbidden:
		return "", false, errors.New("denied by Vault (403): the token has no policy for this path, or has expired")
	case code == http.StatusNotFound && isDeleted(body):
		return "", false, errDeleted
	case code == http.StatusNotFound:
		return "", false, errors.New("not found in Vault (404): in a KV mount of version 2 the path is MOUNT/data/NAME")
	default:
		return "", code >= 500 || code == http.StatusTooManyRequests, fmt.Errorf("the answer of Vault is %s", resp.Status)
	}
}

// vaultToken returns the token in VAULT_TOKEN or, if that isn't set, in the file that VAULT_TOKEN_FILE names. If
// neither is set, it returns the one in ~/.vault-token, where Vault's own command stores it.
func vaultToken() (string, error) {
	if token := os.Getenv("VAULT_TOKEN"); token != "" {
		return token, nil
	}
	setting, file := "VAULT_TOKEN_FILE", os.Getenv("VAULT_TOKEN_FILE")
	if file == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return "", errors.New("there is no token for Vault: set VAULT_TOKEN_FILE")
		}
		setting, file = "the default, as neither VAULT_TOKEN nor VAULT_TOKEN_FILE is set", filepath.Join(home, ".vault-token")
	}
	data, err := inputfile.Read(setting, file)
	if err != nil {
		return "", fmt.Errorf("reading the token for Vault: %w", err)
	}
	token := strings.TrimSpace(string(data))
	if token == "" || strings.ContainsAny(token, "\r\n") {
		return "", fmt.Errorf("%s is to hold Vault's token, in one line", file)
	}
	return token, nil
}

// vaultClient returns a client that follows one redirect, as from a standby to the active node. It follows none from
// https to http, as the token goes with it.
func vaultClient() (*http.Client, error) {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.TLSClientConfig = &tls.Config{ServerName: os.Getenv("VAULT_TLS_SERVER_NAME")}
	if file := os.Getenv("VAULT_CACERT"); file != "" {
		data, err := inputfile.Read("VAULT_CACERT", file)
		if err != nil {
			return nil, err
		}
		roots := x509.NewCertPool()
		if !roots.AppendCertsFromPEM(data) {
			return nil, fmt.Errorf("VAULT_CACERT: %s holds no certificate in PEM", file)
		}
		transport.TLSClientConfig.RootCAs = roots
	}
	return &http.Client{Transport: transport, CheckRedirect: func(req *http.Request, via []*http.Request) error {
		if len(via) > 1 || via[0].URL.Scheme == "https" && req.URL.Scheme != "https" {
			return errors.New("redirected by Vault more than once, or away from https")
		}
		return nil
	}}, nil
}

var errDeleted = errors.New("its newest version was deleted")

// isDeleted reports whether the body of a 404 describes an entry whose newest version was deleted or destroyed.
func isDeleted(body []byte) bool {
	var answer map[string]json.RawMessage
	if json.Unmarshal(body, &answer) != nil {
		return false
	}
	_, err := vaultFields(answer)
	return errors.Is(err, errDeleted)
}

// vaultFields returns the fields of a KV entry, which version 2 wraps in another object. It is an error if there are
// none: errDeleted if the entry's newest version was deleted.
func vaultFields(answer map[string]json.RawMessage) (map[string]json.RawMessage, error) {
	var one, two map[string]json.RawMessage
	if json.Unmarshal(answer["data"], &one) != nil || one == nil {
		return nil, errors.New("the answer of Vault has no data")
	}
	if _, versioned := one["metadata"]; versioned && json.Unmarshal(one["data"], &two) == nil && len(one) == 2 {
		if two == nil {
			return nil, errDeleted
		}
		return two, nil
	}
	return one, nil
}
