package object

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"os"
	"sync"

	"golang.org/x/oauth2"
	"golang.org/x/oauth2/jwt"

	"kedge/deployments/inputfile"
)

const (
	gsScope  = "https://www.googleapis.com/auth/devstorage.read_write"
	gsTokens = "https://oauth2.googleapis.com/token"
)

// gsAccount gets tokens for the service account whose key file GOOGLE_APPLICATION_CREDENTIALS names. It uses a
// token until that expires, and reads the file again for the next.
type gsAccount struct {
	http *http.Client

	mu    sync.Mutex
	file  string // the file that token was got with
	token *oauth2.Token
}

// get returns a token; empty: the environment names no file.
func (a *gsAccount) get(ctx context.Context) (string, error) {
	file := os.Getenv("GOOGLE_APPLICATION_CREDENTIALS")
	if file == "" {
		return "", nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.file == file && a.token.Valid() {
		return a.token.AccessToken, nil
	}
	token, err := exchange(context.WithValue(ctx, oauth2.HTTPClient, a.http), file)
	if err != nil {
		return "", fmt.Errorf("GOOGLE_APPLICATION_CREDENTIALS: %w", err)
	}
	a.file, a.token = file, token
	return token.AccessToken, nil
}

// exchange gets a token for a claim signed with the key in a service account's file. If the server
// refuses, the error wraps ErrDenied.
func exchange(ctx context.Context, file string) (*oauth2.Token, error) {
	data, err := inputfile.Read("the service account's key", file)
	if err != nil {
		return nil, err
	}
	var key struct {
		Type  string `json:"type"`
		Email string `json:"client_email"`
		ID    string `json:"private_key_id"`
		Key   string `json:"private_key"`
		URI   string `json:"token_uri"`
	}
	if err := json.Unmarshal(data, &key); err != nil {
		// the error itself may quote a part of the key
		return nil, fmt.Errorf("%s is not the key file of a service account in JSON", file)
	}
	if key.Type != "service_account" {
		return nil, fmt.Errorf("%s holds credentials of type %q: want a service_account's key", file, key.Type)
	}
	if block, _ := pem.Decode([]byte(key.Key)); block == nil {
		return nil, fmt.Errorf("%s holds no private key", file)
	}
	if key.URI == "" {
		key.URI = gsTokens
	}
	c := jwt.Config{
		Email: key.Email, PrivateKey: []byte(key.Key), PrivateKeyID: key.ID, TokenURL: key.URI, Scopes: []string{gsScope},
	}
	token, err := c.TokenSource(ctx).Token()
	var refused *oauth2.RetrieveError
	switch {
	case errors.As(err, &refused):
		r := refused.Response
		var transient *transientError
		if errors.As(statusError(r.StatusCode, r.Status, retryAfter(r.Header)), &transient) {
			return nil, &transientError{err: fmt.Errorf("%s gives no token: %s", key.URI, r.Status), after: transient.after}
		}
		var why struct {
			Text string `json:"error_description"`
		}
		_ = json.Unmarshal(refused.Body, &why)
		return nil, fmt.Errorf("%w: %s gives %s no token: %s %q", ErrDenied, key.URI, key.Email, r.Status, why.Text)
	case err != nil:
		return nil, &transientError{err: fmt.Errorf("asking %s for a token: %w", key.URI, err)}
	}
	return token, nil
}
