package consul

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"

	"github.com/hashicorp/consul/api"
)

// maxAnswer bounds an answer of Consul in bytes, unless that is a list of keys. The largest that kedge asks for is the
// list of a node's sessions.
const maxAnswer = 16 << 20

// answers bounds what is read of Consul's answers, as its client would read each to its end. A list of keys whose
// request has a pairReader is read by that, pair by pair; the client then gets an empty list.
type answers struct{ http.RoundTripper }

func (a answers) RoundTrip(r *http.Request) (*http.Response, error) {
	answer, err := a.RoundTripper.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	reader, is := r.Context().Value(pairReaderKey{}).(*pairReader)
	if !is || answer.StatusCode != http.StatusOK {
		answer.Body = &boundedBody{answer.Body, maxAnswer}
		return answer, nil
	}
	reader.read(answer.Body)
	answer.Body.Close()
	answer.Body, answer.ContentLength = io.NopCloser(strings.NewReader("[]")), -1
	return answer, nil
}

// CloseIdleConnections passes on what http.Client asks for.
func (a answers) CloseIdleConnections() {
	if c, is := a.RoundTripper.(interface{ CloseIdleConnections() }); is {
		c.CloseIdleConnections()
	}
}

// errLongAnswer is the error of reading beyond maxAnswer.
var errLongAnswer = errors.New("consul's answer is too long")

// boundedBody is a body of which at most left more bytes are read.
type boundedBody struct {
	io.ReadCloser
	left int
}

func (b *boundedBody) Read(p []byte) (int, error) {
	if b.left < 0 {
		return 0, errLongAnswer
	}
	if len(p) > b.left+1 {
		p = p[:b.left+1] // a byte too many tells a body that ends at the bound from a longer one
	}
	n, err := b.ReadCloser.Read(p)
	if b.left -= n; b.left < 0 {
		return n + b.left, errLongAnswer
	}
	return n, err
}

// pairReader calls take with the pairs of a list, one at a time, until that returns an error. err is that error, or
// why the list can't be read.
type pairReader struct {
	take func(*api.KVPair) error
	err  error
}

type pairReaderKey struct{}

// in returns a context for the list's request.
func (r *pairReader) in(ctx context.Context) context.Context {
	return context.WithValue(ctx, pairReaderKey{}, r)
}

func (r *pairReader) read(body io.Reader) {
	r.err = r.readAll(&boundedBody{io.NopCloser(body), maxAnswer})
}

// readAll reads a list, of which each pair may have maxAnswer.
func (r *pairReader) readAll(body *boundedBody) error {
	d := json.NewDecoder(body)
	switch start, err := d.Token(); {
	case err != nil:
		return fmt.Errorf("read consul's list: %w", err)
	case start == nil: // null
		return nil
	case start != json.Delim('['):
		return fmt.Errorf("read consul's list: it begins with %v", start)
	}
	for d.More() {
		body.left = maxAnswer
		var pair api.KVPair
		if err := d.Decode(&pair); err != nil {
			return fmt.Errorf("read consul's list: %w", err)
		}
		if err := r.take(&pair); err != nil {
			return err
		}
	}
	if _, err := d.Token(); err != nil { // it was cut off
		return fmt.Errorf("read consul's list: %w", err)
	}
	return nil
}
