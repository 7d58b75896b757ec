package object

import (
	"cmp"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/aws/smithy-go"
	smithyhttp "github.com/aws/smithy-go/transport/http"

	"kedge/deployments/safetext"
)

// maxMessage bounds, in bytes, how much of S3's own message an error quotes.
const maxMessage = 500

// expectedRegion matches the words in which a server names its region if it was asked as one of another region.
var expectedRegion = regexp.MustCompile(`expecting ["']([a-z0-9-]{1,64})["']`)

// s3Error returns an error of the SDK as one of this package, if one fits. It removes what the SDK adds: request IDs,
// host names, and parts of the request.
func s3Error(err error) error {
	if err == nil {
		return nil
	}
	// This comes before the answer is examined, which may be the metadata service's or STS's, and not S3's.
	if _, why, is := strings.Cut(err.Error(), "get credentials: "); is {
		why = strings.TrimPrefix(why, "failed to refresh cached credentials, ")
		return &transientError{
			err: fmt.Errorf("%w (%s): %s", ErrCredentials, credentialSources(os.Getenv), safetext.Clip(why, maxMessage)),
		}
	}
	code, message, region, after := 0, "", "", time.Duration(0)
	var response *smithyhttp.ResponseError
	if errors.As(err, &response) {
		code = response.HTTPStatusCode()
		message = response.Response.Status
		region = response.Response.Header.Get("X-Amz-Bucket-Region")
		after = retryAfter(response.Response.Header)
	}
	call := "S3"
	if op := (*smithy.OperationError)(nil); errors.As(err, &op) {
		call = "S3's " + op.OperationName
	}
	var api smithy.APIError
	asAPI := errors.As(err, &api)
	if asAPI && region == "" {
		// Servers other than AWS's, and some answers of AWS itself, name the region in the message alone.
		if m := expectedRegion.FindStringSubmatch(api.ErrorMessage()); m != nil {
			region = m[1]
		}
	}
	if region != "" &&
		(code == http.StatusMovedPermanently || asAPI && api.ErrorCode() == "AuthorizationHeaderMalformed") {
		return fmt.Errorf("the bucket is in region %s: set AWS_REGION, or the profile's region, to that", region)
	}
	if asAPI {
		message = strings.TrimSpace(api.ErrorCode() + " " + safetext.Clip(safetext.Printable(api.ErrorMessage()), maxMessage))
		switch api.ErrorCode() {
		case "AccessDenied", "Forbidden": // Forbidden if the answer has no body
			if strings.Contains(strings.ToLower(api.ErrorMessage()), "kms") {
				return fmt.Errorf(
					"%w: %s answered %s: the policy of the KMS key, or the role's, doesn't allow the use of that key",
					ErrDenied,
					call,
					message,
				)
			}
			return fmt.Errorf(
				"%w: %s answered %s; it answers so for a missing object, too, if s3:ListBucket isn't allowed",
				ErrDenied,
				call,
				message,
			)
		case "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired":
			return fmt.Errorf("%w: %s answered %s", ErrDenied, call, message)
		case "NoSuchBucket":
			return fmt.Errorf(
				"%w: there is no such bucket: check its name, AWS_REGION and AWS_ENDPOINT_URL_S3",
				ErrNotFound,
			)
		case "NoSuchVersion":
			return fmt.Errorf("%w: there is no such version of it", ErrNotFound)
		case "RequestTimeout", "SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeTooSkewed", "OperationAborted",
			"ConditionalRequestConflict": // another writes the same object just now
			return &transientError{err: fmt.Errorf("S3 answered %s", message), after: after}
		}
		if strings.HasPrefix(api.ErrorCode(), "KMS.") {
			return fmt.Errorf("%w: %s could not use the key that encrypts the object: %s", ErrDenied, call, message)
		}
	}
	if refused := (redirectError{}); errors.As(err, &refused) {
		return fmt.Errorf("redirected by S3: %w", refused.error)
	}
	if isLocalAddress(err) {
		return unavailableError{plain(cause(err))}
	}
	if code == 0 {
		// No answer: no connection, or a cut one.
		return &transientError{err: plain(cause(err))}
	}
	return statusError(code, message, after)
}

// credentialSources describes where AWS credentials were looked for, in the SDK's order, and what was found.
func credentialSources(getenv func(string) string) string {
	var tried []string
	add := func(name string, there bool, what string) {
		if !there {
			what = "not set"
		}
		tried = append(tried, name+" "+what)
	}
	add("AWS_ACCESS_KEY_ID", getenv("AWS_ACCESS_KEY_ID") != "", "is set")
	add("AWS_WEB_IDENTITY_TOKEN_FILE", getenv("AWS_WEB_IDENTITY_TOKEN_FILE") != "", "is set")
	home, _ := os.UserHomeDir()
	for _, f := range []struct{ variable, file string }{{"AWS_SHARED_CREDENTIALS_FILE", "credentials"}, {"AWS_CONFIG_FILE", "config"}} {
		path := cmp.Or(getenv(f.variable), filepath.Join(home, ".aws", f.file))
		if _, err := os.Stat(path); err != nil {
			tried = append(tried, path+" can't be read")
			continue
		}
		tried = append(tried, path+" is read for profile "+cmp.Or(getenv("AWS_PROFILE"), "default"))
	}
	container := getenv("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI") != "" ||
		getenv("AWS_CONTAINER_CREDENTIALS_FULL_URI") != ""
	add("a container's credentials", container, "are set")
	if strings.EqualFold(getenv("AWS_EC2_METADATA_DISABLED"), "true") {
		tried = append(tried, "the instance's role is switched off by AWS_EC2_METADATA_DISABLED")
	} else {
		tried = append(tried, "the instance's role is asked for only if none of these is set")
	}
	return strings.Join(tried, ", ")
}

// cause returns an error of the SDK without the wrapping that names the operation and the request.
func cause(err error) error {
	var op *smithy.OperationError
	if errors.As(err, &op) {
		err = op.Err
	}
	var sent *smithyhttp.RequestSendError
	if errors.As(err, &sent) {
		err = sent.Err
	}
	return err
}
