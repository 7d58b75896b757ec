package object

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"time"
)

// gsStore implements gs://, by the XML API with a bearer token. At an endpoint other than Google's,
// it may do without a token.
type gsStore struct {
	http     *http.Client
	endpoint string // empty: Google's
	account  *gsAccount
}

const (
	gsEndpoint    = "https://storage.googleapis.com"
	metadataToken = "http://metadata.google.internal/computeMetadata/v1/instance/service-accounts/default/token"
)

func (s *gsStore) address(u *url.URL) string {
	return cmp.Or(s.endpoint, gsEndpoint) + "/" + u.Host + "/" + (&url.URL{Path: key(u)}).EscapedPath()
}

// header returns the Authorization header with the first of these tokens: that in
// GOOGLE_OAUTH_ACCESS_TOKEN, one for the account of GOOGLE_APPLICATION_CREDENTIALS, or the
// instance's own. An endpoint other than Google's never gets the instance's token; if there is no
// other, the result is empty.
func (s *gsStore) header(ctx context.Context) (http.Header, error) {
	token := os.Getenv("GOOGLE_OAUTH_ACCESS_TOKEN")
	var err error
	if token == "" {
		if token, err = s.account.get(ctx); err != nil {
			return nil, err
		}
	}
	if token == "" && s.endpoint == "" {
		if token, err = s.instanceToken(ctx); err != nil {
			return nil, err
		}
	}
	h := http.Header{}
	if token != "" {
		h.Set("Authorization", "Bearer "+token)
	}
	return h, nil
}

func (s *gsStore) stat(ctx context.Context, u *url.URL) (Object, error) {
	h, err := s.header(ctx)
	if err != nil {
		return Object{}, err
	}
	r, err := send(ctx, s.http, http.MethodHead, s.address(u), h, nil)
	if err != nil {
		return Object{}, err
	}
	defer r.Body.Close()
	return objectOf(r)
}

func (s *gsStore) read(ctx context.Context, u *url.URL, o Object, offset, n int64) (io.ReadCloser, int64, error) {
	h, err := s.header(ctx)
	if err != nil {
		return nil, 0, err
	}
	return readHTTP(ctx, s.http, s.address(u), h, o, offset, n)
}

func (s *gsStore) put(ctx context.Context, u *url.URL, b *body, contentType string) error {
	h, err := s.header(ctx)
	if err != nil {
		return err
	}
	if !b.replace {
		h.Set("X-Goog-If-Generation-Match", "0")
	}
	if contentType != "" {
		h.Set("Content-Type", contentType)
	}
	r, err := send(ctx, s.http, http.MethodPut, s.address(u), h, b)
	if errors.Is(err, ErrChanged) {
		return errOccupied
	}
	if err != nil {
		return err
	}
	return r.Body.Close()
}

// instanceToken asks the metadata server of a Google instance for its service account's token.
func (s *gsStore) instanceToken(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	r, err := send(ctx, s.http, http.MethodGet, metadataToken, http.Header{"Metadata-Flavor": {"Google"}}, nil)
	if err != nil {
		return "", fmt.Errorf(
			"gs:// needs GOOGLE_APPLICATION_CREDENTIALS, GOOGLE_OAUTH_ACCESS_TOKEN, or an instance with a service account: %w",
			err,
		)
	}
	defer r.Body.Close()
	var answer struct {
		Token string `json:"access_token"`
	}
	err = json.NewDecoder(io.LimitReader(r.Body, 64<<10)).Decode(&answer)
	if err == nil && answer.Token == "" {
		err = errors.New("the answer has no access_token")
	}
	if err != nil {
		return "", fmt.Errorf("the metadata server gave no token: %w", err)
	}
	return answer.Token, nil
}
