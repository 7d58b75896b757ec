package transport

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"kedge/deployments/inputfile"
)

// renewBefore is how long before its expiry an installation token is replaced. GitHub's expire after an hour.
const renewBefore = 5 * time.Minute

// githubApp is the configuration of a GitHub App. With its private key it obtains tokens that read one installation's
// repositories.
type githubApp struct{ id, installation, keyFile, api string }

// installationToken is the token that GitHub issues to the app's installation.
type installationToken struct {
	Token   string    `json:"token"`
	Expires time.Time `json:"expires_at"`
}

// githubApp returns the GitHub App that the environment configures for a host; nil: none.
func (a Access) githubApp(host string) (*githubApp, error) {
	app := githubApp{a.Env("KEDGE_GITHUB_APP_ID"), a.Env("KEDGE_GITHUB_APP_INSTALLATION"),
		a.Env("KEDGE_GITHUB_APP_KEY_FILE"), a.Env("KEDGE_GITHUB_API")}
	if app == (githubApp{}) {
		return nil, nil
	}
	if app.id == "" || app.installation == "" || app.keyFile == "" {
		return nil, errors.New("a GitHub App needs all of KEDGE_GITHUB_APP_ID, KEDGE_GITHUB_APP_INSTALLATION and " +
			"KEDGE_GITHUB_APP_KEY_FILE: one is not set")
	}
	switch {
	case app.api != "":
	case host == "github.com":
		app.api = "https://api.github.com"
	default: // GitHub Enterprise Server
		app.api = "https://" + host + "/api/v3"
	}
	return &app, nil
}

// jwt returns the token that authenticates the app for nine minutes. It is dated a minute back, as clocks differ.
func (a *githubApp) jwt(now time.Time) (string, error) {
	data, err := inputfile.Read("KEDGE_GITHUB_APP_KEY_FILE", a.keyFile)
	if err != nil {
		return "", err
	}
	key, err := parseRSA(data)
	if err != nil {
		return "", fmt.Errorf("KEDGE_GITHUB_APP_KEY_FILE: %s: %w", a.keyFile, err)
	}
	claims, err := json.Marshal(map[string]any{"iss": a.id, "iat": now.Add(-time.Minute).Unix(),
		"exp": now.Add(9 * time.Minute).Unix()})
	if err != nil {
		return "", err
	}
	encode := base64.RawURLEncoding.EncodeToString
	signed := encode([]byte(`{"alg":"RS256","typ":"JWT"}`)) + "." + encode(claims)
	sum := sha256.Sum256([]byte(signed))
	signature, err := rsa.SignPKCS1v15(rand.Reader, key, crypto.SHA256, sum[:])
	if err != nil {
		return "", err
	}
	return signed + "." + encode(signature), nil
}

func parseRSA(data []byte) (*rsa.PrivateKey, error) {
	block, _ := pem.Decode(data)
	if block == nil {
		return nil, errors.New("it has no private key in PEM")
	}
	if key, err := x509.ParsePKCS1PrivateKey(block.Bytes); err == nil { // GitHub's format
		return key, nil
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, err
	}
	if key, ok := key.(*rsa.PrivateKey); ok {
		return key, nil
	}
	return nil, errors.New("it isn't an RSA key")
}

// makeToken requests an installation token from GitHub that may only read repositories' contents.
func (a *githubApp) makeToken(ctx context.Context, client *http.Client, now time.Time) (installationToken, error) {
	var token installationToken
	jwt, err := a.jwt(now)
	if err != nil {
		return token, err
	}
	address := strings.TrimRight(a.api, "/") + "/app/installations/" + a.installation + "/access_tokens"
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, address,
		bytes.NewReader([]byte(`{"permissions":{"contents":"read"}}`)))
	if err != nil {
		return token, err
	}
	req.Header.Set("Authorization", "Bearer "+jwt)
	req.Header.Set("Accept", "application/vnd.github+json")
	req.Header.Set("X-GitHub-Api-Version", "2022-11-28")
	resp, err := client.Do(req)
	if err != nil {
		return token, fmt.Errorf("requesting a token for GitHub App %s: %w", a.id, bare(err))
	}
	defer resp.Body.Close()
	err = json.NewDecoder(io.LimitReader(resp.Body, 1<<20)).Decode(&token)
	if err == nil && token.Token == "" {
		err = errors.New("GitHub's answer has no token")
	}
	if err != nil {
		return token, fmt.Errorf("requesting a token for GitHub App %s: %w", a.id, err)
	}
	return token, nil
}
