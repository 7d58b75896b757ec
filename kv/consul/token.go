package consul

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"kedge/deployments/inputfile"
)

// tokenSource returns the current ACL token. Secrets managers replace its file while kedge runs.
type tokenSource struct {
	file string // empty: the token is fixed

	mu      sync.Mutex
	token   string
	size    int64
	modTime time.Time
	failed  bool // the last read of the file failed, which was reported
}

func newTokenSource(token, file string) (*tokenSource, error) {
	t := &tokenSource{token: token, file: file}
	if file == "" {
		return t, nil
	}
	if err := t.load(); err != nil {
		return nil, err
	}
	return t, nil
}

// get returns the token, read again if its file changed. While the file is missing or invalid it returns the last
// token, and the error only the first time.
func (t *tokenSource) get() (string, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.file == "" {
		return t.token, nil
	}
	info, err := os.Stat(t.file)
	if err == nil && (info.Size() != t.size || !info.ModTime().Equal(t.modTime)) {
		err = t.load()
	}
	if err != nil && !t.failed {
		t.failed = true
		return t.token, err
	}
	t.failed = err != nil
	return t.token, nil
}

// reread reads the token file again, even if it seems unchanged, and returns the token. If the file can't be read, it
// returns the last token.
func (t *tokenSource) reread() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.file != "" {
		_ = t.load()
	}
	return t.token
}

func (t *tokenSource) load() error {
	data, err := inputfile.Read("CONSUL_HTTP_TOKEN_FILE", t.file)
	if err != nil {
		return err
	}
	token := strings.TrimSpace(string(data))
	if token == "" {
		return fmt.Errorf("read the token file %s: %w", t.file, errEmptyToken)
	}
	t.token = token
	if info, err := os.Stat(t.file); err == nil {
		t.size, t.modTime = info.Size(), info.ModTime()
	}
	return nil
}

var errEmptyToken = errors.New("it is empty, and without a token Consul would show an empty store")
