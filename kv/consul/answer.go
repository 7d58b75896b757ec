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

// maxAnswer bounds each pair of a list of keys, and any other answer of Consul, in bytes. The largest of these is the
// list of a node's sessions.
const maxAnswer = 16 << 20

// answers is a transport that bounds what is read of Consul's answers, as Consul's client would read any answer to its
// end. If a request for a list of keys has a pairReader, the pairs go to that reader one by one. The client then gets
// an empty list, even if the reader fails.
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

// CloseIdleConnections closes the idle connections of the transport that answers wraps. http.Client calls it.
func (a answers) CloseIdleConnections() {
	if c, is := a.RoundTripper.(interface{ CloseIdleConnections() }); is {
		c.CloseIdleConnections()
	}
}

// errLongAnswer is the error of reading beyond maxAnswer.
var errLongAnswer = fmt.Errorf("the answer has more than %d MiB: see whether CONSUL_HTTP_ADDR leads to a Consul agent",
	maxAnswer>>20)

// boundedBody is an answer's body. If the body is longer than left bytes, reads beyond these fail with errLongAnswer.
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

// pairReader calls take with the pairs of a list, one at a time, until take returns an error. err is that error, or the
// reason why the list can't be read.
type pairReader struct {
	take func(*api.KVPair) error
	err  error
}

type pairReaderKey struct{}

// in returns a context for a list's request, so that answers passes the pairs to r.
func (r *pairReader) in(ctx context.Context) context.Context {
	return context.WithValue(ctx, pairReaderKey{}, r)
}

func (r *pairReader) read(body io.Reader) {
	r.err = r.readAll(&boundedBody{io.NopCloser(body), maxAnswer})
}

// readAll reads a list. Each of its pairs may have up to maxAnswer bytes.
func (r *pairReader) readAll(body *boundedBody) error {
	d := json.NewDecoder(body)
	switch start, err := d.Token(); {
	case errors.As(err, new(*json.SyntaxError)):
		return fmt.Errorf("read Consul's list: %w: see whether CONSUL_HTTP_ADDR leads to a Consul agent", err)
	case err != nil:
		return fmt.Errorf("read Consul's list: %w", err)
	case start == nil: // null
		return nil
	case start != json.Delim('['):
		return fmt.Errorf("read Consul's list: want a JSON list, not %v: see whether CONSUL_HTTP_ADDR leads to a "+
			"Consul agent", start)
	}
	for d.More() {
		body.left = maxAnswer
		var pair api.KVPair
		if err := d.Decode(&pair); err != nil {
			return fmt.Errorf("read Consul's list: %w", err)
		}
		if err := r.take(&pair); err != nil {
			return err
		}
	}
	if _, err := d.Token(); err != nil { // it was cut off
		return fmt.Errorf("read Consul's list: %w", err)
	}
	return nil
}
