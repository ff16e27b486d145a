// PixelMed's DicomSRValidator over many files: its templates take 10 s to compile, once per process.
import com.pixelmed.validate.DicomSRValidator;

public class ValidateReports {
    public static void main(String[] files) throws Exception {
        DicomSRValidator validator = new DicomSRValidator();
        for (String file : files) {
            System.out.println("FILE " + file);
            System.out.println(validator.validate(file));
        }
    }
}
