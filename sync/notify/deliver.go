package notify

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	webhooks "github.com/standard-webhooks/standard-webhooks/libraries/go"

	"kedge/deployments/inputfile"
	"kedge/sync/fleet/message"
)

// errRefused is wrapped by errors that a second try hardly changes: of an answer such as 404 or a
// redirect, and of an invalid URL in url_file.
var errRefused = errors.New("refused")

// retryAfterError means that the server is busy or failed, so that a later try may succeed.
type retryAfterError struct {
	after time.Duration // the seconds in Retry-After, at most maxPause; 0: none
	err   error
}

func (e *retryAfterError) Error() string { return e.err.Error() }
func (e *retryAfterError) Unwrap() error { return e.err }

// deliver sends an event once.
func (r *Receiver) deliver(ctx context.Context, client *http.Client, source string, e Event) error {
	to, err := secretOr("url_file", r.URL, r.URLFile)
	if err != nil {
		return err
	}
	if err := checkURL(to); err != nil { // of a file; url was checked when the configuration was read
		return fmt.Errorf("%w: the URL in %s: %w", errRefused, r.URLFile, err) // and so not tried for a day
	}
	body, kind, err := r.encode(source, e)
	if err != nil {
		return err
	}
	header := http.Header{"Content-Type": {kind}}
	if r.SecretFile != "" {
		secret, err := secretOr("secret_file", "", r.SecretFile)
		if err != nil {
			return err
		}
		if err := sign(header, secret, e.ID, time.Now(), body); err != nil {
			return err
		}
	}
	return send(ctx, client, http.MethodPost, to, header, body)
}

// sign adds the headers of Standard Webhooks.
func sign(header http.Header, secret, id string, at time.Time, body []byte) error {
	signer, err := webhooks.NewWebhook(secret)
	if err != nil { // the text isn't base64, with or without whsec_ before it: it is the secret itself
		if signer, err = webhooks.NewWebhookRaw([]byte(secret)); err != nil {
			return errors.New("the secret of the receiver is empty")
		}
	}
	signature, err := signer.Sign(id, at, body)
	if err != nil {
		return fmt.Errorf("signing the event: %w", err)
	}
	header.Set("webhook-id", id)
	header.Set("webhook-timestamp", strconv.FormatInt(at.Unix(), 10))
	header.Set("webhook-signature", signature)
	return nil
}

// encode returns an event in the receiver's format, and its content type.
func (r *Receiver) encode(source string, e Event) (body []byte, contentType string, err error) {
	var v any
	contentType = "application/json"
	switch r.Format {
	case FormatSlack:
		v = map[string]string{"text": escapeSlack(r.text(e))}
	case FormatTeams:
		v = map[string]any{"type": "message", "attachments": []any{
			map[string]any{
				"contentType": "application/vnd.microsoft.card.adaptive",
				"content": map[string]any{
					"type":    "AdaptiveCard",
					"version": "1.4",
					"$schema": "http://adaptivecards.io/schemas/adaptive-card.json",
					"body":    []any{map[string]any{"type": "TextBlock", "text": escapeTeams(r.text(e)), "wrap": true}},
				},
			},
		}}
	default:
		contentType = "application/cloudevents+json"
		event := map[string]any{
			"specversion": "1.0", "id": e.ID, "source": source, "type": "kedge." + string(e.Kind), "subject": e.Data.Unit,
			"datacontenttype": "application/json", "data": e.Data,
		}
		if e.Data.Unit == "" {
			delete(event, "subject")
		}
		if !e.At.IsZero() {
			event["time"] = e.At.UTC().Format(time.RFC3339Nano)
		}
		v = event
	}
	body, err = json.Marshal(v)
	return body, contentType, err
}

// text fills in the receiver's template.
func (r *Receiver) text(e Event) string {
	template := r.Text
	if template == "" {
		template = "{message} {link}"
	}
	values := map[string]string{
		"message": e.Data.Message,
		"kind":    string(e.Kind),
		"unit":    e.Data.Unit,
		"link":    e.Data.Link,
		"release": e.Data.Release.String(),
		"commit":  e.Data.Commit,
		"author":  e.Data.Author,
		"subject": e.Data.Subject,
	}
	if e.Data.Release.IsZero() {
		values["release"] = ""
	}
	pairs := []string{}
	for name, value := range values {
		pairs = append(pairs, "{"+name+"}", value)
	}
	return strings.TrimSpace(strings.NewReplacer(pairs...).Replace(template))
}

// escapeSlack escapes &, < and >, so that an author's name can't mention a channel or hide a link.
func escapeSlack(s string) string {
	return strings.NewReplacer("&", "&amp;", "<", "&lt;", ">", "&gt;").Replace(s)
}

// escapeTeams breaks up Markdown links, whose text can hide where they lead.
func escapeTeams(s string) string { return strings.ReplaceAll(s, "](", "] (") }

// send makes one request. Its errors don't contain the URL. A status 408, 429 or 5xx is a *retryAfterError, as is the
// 403 by which GitHub limits a rate; any other but 2xx wraps errRefused. client must follow no redirect, as the
// request may contain a secret for this server alone.
func send(ctx context.Context, client *http.Client, method, to string, header http.Header, body []byte) error {
	ctx, cancel := context.WithTimeout(ctx, sendTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, to, bytes.NewReader(body))
	if err != nil {
		return errors.New("the URL doesn't parse, and is not shown, as it may be secret")
	}
	req.Header = header
	req.Header.Set("User-Agent", "kedge")
	resp, err := client.Do(req)
	if err != nil {
		var wrapped *url.Error
		if errors.As(err, &wrapped) { // the outer error contains the URL
			err = wrapped.Err
		}
		return err
	}
	defer resp.Body.Close()
	answer, _ := io.ReadAll(io.LimitReader(resp.Body, 300))
	_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, 64<<10)) // so that the connection is reused
	if resp.StatusCode/100 == 2 {
		return nil
	}
	err = fmt.Errorf("the server answers %s: %s", resp.Status, message.OneLine(string(answer)))
	switch {
	case resp.StatusCode == http.StatusTooManyRequests,
		resp.StatusCode >= 500,
		resp.StatusCode == http.StatusRequestTimeout,
		resp.StatusCode == http.StatusForbidden && limitsRate(resp.Header):
		seconds, _ := strconv.Atoi(resp.Header.Get("Retry-After"))
		// The seconds are bounded before the conversion, as many would overflow a Duration.
		return &retryAfterError{time.Duration(max(0, min(seconds, int(maxPause/time.Second)))) * time.Second, err}
	default:
		return fmt.Errorf("%w: %w", errRefused, err)
	}
}

// limitsRate reports whether a 403 says that there were too many requests, as GitHub's may:
// https://docs.github.com/en/rest/using-the-rest-api/rate-limits-for-the-rest-api
func limitsRate(h http.Header) bool {
	return h.Get("Retry-After") != "" || h.Get("X-RateLimit-Remaining") == "0"
}

// sendTimeout bounds one request.
const sendTimeout = 10 * time.Second

// secretOr returns value or, if file is set, the file's trimmed content, which must not be empty.
// field is the setting that names the file.
func secretOr(field, value, file string) (string, error) {
	if file == "" {
		return value, nil
	}
	data, err := inputfile.Read(field, file)
	if err != nil {
		return "", err
	}
	text := strings.TrimSpace(string(data))
	if text == "" {
		return "", fmt.Errorf("the file %s is empty", file)
	}
	return text, nil
}
